package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/apiutil"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
)

// ReadyTime is how long an object that was applied may take until it is Ready.
const ReadyTime = 10 * time.Minute

// apply has the cluster make an object what it is here, by server-side apply, and reads back what became of it. What hearth said before
// and does not say now goes back to its default.
func (c *Client) apply(ctx context.Context, object client.Object) error {
	gvk, err := apiutil.GVKForObject(object, c.api.Scheme())
	if err != nil {
		return err
	}
	object.GetObjectKind().SetGroupVersionKind(gvk)
	data, err := json.Marshal(object)
	if err != nil {
		return fmt.Errorf("encode %s %s: %w", gvk.Kind, object.GetName(), err)
	}
	u := &unstructured.Unstructured{}
	if err := u.UnmarshalJSON(data); err != nil {
		return fmt.Errorf("encode %s %s: %w", gvk.Kind, object.GetName(), err)
	}
	// What the cluster alone writes must not be claimed by hearth.
	unstructured.RemoveNestedField(u.Object, "status")
	unstructured.RemoveNestedField(u.Object, "metadata", "creationTimestamp")
	if err := c.api.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.ForceOwnership); err != nil {
		return err
	}
	// Apply has read the answer into u.
	if data, err = u.MarshalJSON(); err == nil {
		err = json.Unmarshal(data, object)
	}
	if err != nil {
		return fmt.Errorf("read %s %s: %w", gvk.Kind, object.GetName(), err)
	}
	return nil
}

// applied is an object with conditions.
type applied interface {
	client.Object
	*crd.Function | *crd.Runtime | *crd.WarmPool
}

// progress is what the conditions of an object say of its present generation.
type progress struct {
	done    bool
	refused string // why it never will be; empty while it may
	text    string // what it waits for
}

func progressOf(object client.Object) progress {
	conditions, observed := conditionsOf(object)
	if observed < object.GetGeneration() {
		return progress{text: "waiting for poolmanager to take it over"}
	}
	if accepted := meta.FindStatusCondition(conditions, crd.ConditionAccepted); accepted != nil && accepted.Status == metav1.ConditionFalse {
		return progress{refused: said(accepted), text: said(accepted)}
	}
	ready := meta.FindStatusCondition(conditions, crd.ConditionReady)
	if ready == nil {
		return progress{text: "waiting for poolmanager to take it over"}
	}
	return progress{done: ready.Status == metav1.ConditionTrue, text: said(ready)}
}

// said is a condition in words.
func said(c *metav1.Condition) string {
	return strings.TrimPrefix(c.Reason+": "+c.Message, ": ")
}

func conditionsOf(object client.Object) ([]metav1.Condition, int64) {
	switch o := object.(type) {
	case *crd.Function:
		return o.Status.Conditions, o.Status.ObservedGeneration
	case *crd.Runtime:
		return o.Status.Conditions, o.Status.ObservedGeneration
	case *crd.WarmPool:
		return o.Status.Conditions, o.Status.ObservedGeneration
	}
	return nil, 0
}

// awaitReady waits until an object that was applied is Ready, and tells each time what it waits for. object becomes what it then is.
// Errors: FailedPrecondition (refused), DeadlineExceeded, NotFound (it was deleted meanwhile).
func awaitReady[T applied](ctx context.Context, c *Client, list client.ObjectList, object T, tell func(string)) error {
	ctx, cancel := context.WithTimeout(ctx, ReadyTime)
	defer cancel()
	told := ""
	for {
		p := progressOf(object)
		switch {
		case p.done:
			return nil
		case p.refused != "":
			return connect.NewError(connect.CodeInvalidArgument, errors.New(p.refused))
		case p.text != told && tell != nil:
			told = p.text
			tell(p.text)
		}
		if err := next(ctx, c, list, object); err != nil {
			return c.whyNot(context.WithoutCancel(ctx), err, object, p.text)
		}
	}
}

// next waits until an object is not as it is here, and makes it what it has become.
func next[T applied](ctx context.Context, c *Client, list client.ObjectList, object T) error {
	w, err := c.api.Watch(ctx, list, client.InNamespace(c.namespace), client.MatchingFields{"metadata.name": object.GetName()},
		&client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: object.GetResourceVersion()}})
	if err != nil {
		return err
	}
	defer w.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case event, ok := <-w.ResultChan():
			now, isObject := event.Object.(T)
			switch {
			case !ok || event.Type == watch.Error:
				// The server ends watches now and then: look again.
				return c.api.Get(ctx, client.ObjectKeyFromObject(object), object)
			case event.Type == watch.Deleted:
				return connect.NewError(connect.CodeNotFound, errors.New("it has been deleted meanwhile"))
			case isObject && now.GetResourceVersion() != object.GetResourceVersion():
				copyInto(object, now)
				return nil
			}
		}
	}
}

func copyInto[T applied](to, from T) {
	switch to := any(to).(type) {
	case *crd.Function:
		any(from).(*crd.Function).DeepCopyInto(to)
	case *crd.Runtime:
		any(from).(*crd.Runtime).DeepCopyInto(to)
	case *crd.WarmPool:
		any(from).(*crd.WarmPool).DeepCopyInto(to)
	}
}

// whyNot is the error of an object that did not become ready: with what it last said, and with the newest warning about it.
func (c *Client) whyNot(ctx context.Context, err error, object client.Object, last string) error {
	if !errors.Is(err, context.DeadlineExceeded) {
		return c.coded(err)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	text := fmt.Sprintf("it is not ready after %s: %s", ReadyTime, last)
	if warning := c.warning(ctx, object); warning != "" {
		text += "\n" + warning
	}
	return connect.NewError(connect.CodeDeadlineExceeded, errors.New(text))
}

// warning is the newest warning event about an object, or nothing.
func (c *Client) warning(ctx context.Context, object client.Object) string {
	var events corev1.EventList
	if err := c.api.List(ctx, &events, client.InNamespace(c.namespace), client.MatchingFields{"involvedObject.name": object.GetName()}); err != nil {
		return ""
	}
	mine := slices.DeleteFunc(events.Items, func(e corev1.Event) bool {
		return e.Type != corev1.EventTypeWarning || e.InvolvedObject.UID != object.GetUID()
	})
	if len(mine) == 0 {
		return ""
	}
	newest := slices.MaxFunc(mine, func(a, b corev1.Event) int { return a.LastTimestamp.Compare(b.LastTimestamp.Time) })
	return newest.Reason + ": " + newest.Message
}
