package kube

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
)

const (
	// lookEvery is how often the pool is asked for what changed: that is how often a status is written at most.
	lookEvery = 2 * time.Second
	// askTime bounds what the pool may wait for: gateways that have to hear, Instances that drain. It goes on without.
	askTime = 100 * time.Millisecond
	// tryAgain is after when what may not be done yet is tried again: a Runtime that is not there, or still in use.
	tryAgain = 2 * time.Second
	// firstRetry and lastRetry bound the pauses after errors, so that all is in step soon after an API server has come back.
	firstRetry, lastRetry = 50 * time.Millisecond, 10 * time.Second
	// maxMessage bounds a condition's message, in which may be what a node or a registry said.
	maxMessage = 1024
)

// Config says whom the controllers work for. All must be set.
type Config struct {
	// Namespace of all that Hearth runs.
	Namespace string
	Functions Functions
	Runtimes  Runtimes
	Pools     WarmPools
	// URL of a Function at the gateway.
	URL func(function string) string
}

// NewScheme knows Kubernetes' own kinds and Hearth's.
func NewScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	if err := errors.Join(clientscheme.AddToScheme(s), crd.AddToScheme(s)); err != nil {
		panic(err) // two kinds of one name were compiled in
	}
	return s
}

// AddControllers has a manager run the controllers of all four kinds, for one term: a manager is not started twice. Its cache should be
// bounded to the namespace, its scheme NewScheme's, and its own leader election off.
func AddControllers(m manager.Manager, c Config) error {
	if c.Namespace == "" || c.Functions == nil || c.Runtimes == nil || c.Pools == nil || c.URL == nil {
		return errors.New("kube: Config is not complete")
	}
	o := objects{Client: m.GetClient(), live: m.GetAPIReader(), events: m.GetEventRecorder("hearth-poolmanager")}
	return errors.Join(
		addFunctions(m, c, &functions{objects: o, pool: c.Functions, url: c.URL, applied: map[types.NamespacedName]string{}}),
		addRuntimes(m, c, &runtimes{objects: o, pool: c.Runtimes, applied: map[string]string{}}),
		addWarmPools(m, c, &warmPools{objects: o, pool: c.Pools}),
		addRevisions(m, &revisions{objects: o, now: time.Now}),
	)
}

// objects is how the controllers reach the API server's objects.
type objects struct {
	client.Client               // that reads from the cache
	live          client.Reader // that does not
	events        events.EventRecorder
}

// get reads an object, and says whether it is there to stay. One that the cache does not have is looked up, for who acts upon its
// absence must not be misled by a cache that is behind.
func (o objects) get(ctx context.Context, key types.NamespacedName, into client.Object) (there bool, err error) {
	err = o.Get(ctx, key, into)
	if apierrors.IsNotFound(err) {
		err = o.live.Get(ctx, key, into)
	}
	switch {
	case apierrors.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("get %s: %w", key, err)
	}
	// With foreground deletion it is there until all that it owns is gone.
	return into.GetDeletionTimestamp().IsZero(), nil
}

// writeStatus writes what differs, if anything does.
func (o objects) writeStatus(ctx context.Context, before, after client.Object) error {
	if equality.Semantic.DeepEqual(before, after) {
		return nil
	}
	if err := o.Status().Patch(ctx, after, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("write the status of %s: %w", after.GetName(), err)
	}
	return nil
}

// verdict is a condition to be.
type verdict struct {
	status          metav1.ConditionStatus
	reason, message string
	fault           bool // worth an event
}

func yes(reason, message string) verdict {
	return verdict{metav1.ConditionTrue, reason, message, false}
}

// notYet is false in the ordinary course of things, and fault for a reason that somebody should look at.
func notYet(reason, message string) verdict {
	return verdict{metav1.ConditionFalse, reason, message, false}
}
func fault(reason, message string) verdict {
	return verdict{metav1.ConditionFalse, reason, message, true}
}

// unaccepted is what Ready is while Accepted is not.
func (v verdict) unaccepted() verdict { return notYet(v.reason, "it is not accepted: "+v.message) }

// accepted is the verdict on a spec that the pool has taken over.
func accepted() verdict { return yes("Accepted", "the spec is taken over") }

// judge sets a condition, and tells by an event of a fault that is new.
func (o objects) judge(object client.Object, conditions *[]metav1.Condition, kind string, v verdict) {
	v.message = cut(v.message)
	before := apimeta.FindStatusCondition(*conditions, kind)
	news := before == nil || before.Status != v.status || before.Reason != v.reason
	apimeta.SetStatusCondition(conditions, metav1.Condition{Type: kind, Status: v.status, Reason: v.reason, Message: v.message, ObservedGeneration: object.GetGeneration()})
	if news && v.fault {
		o.events.Eventf(object, nil, corev1.EventTypeWarning, v.reason, "Reconcile", "%s", v.message)
	}
}

// cut bounds a message, and makes it UTF-8, which the API server demands.
func cut(s string) string {
	if len(s) > maxMessage {
		s = s[:maxMessage] + "…"
	}
	return string([]rune(s))
}

// said is what an error of the pool says, without its code.
func said(err error) string {
	var e *connect.Error
	if errors.As(err, &e) {
		return e.Message()
	}
	return err.Error()
}

// goesOn says that the pool does what it was asked, though not within the time.
func goesOn(err error) bool {
	code := connect.CodeOf(err)
	return err != nil && (code == connect.CodeDeadlineExceeded || code == connect.CodeCanceled)
}

func options(workers int) controller.Options {
	skip := true // the names are in use already in a process that leads once more
	return controller.Options{MaxConcurrentReconciles: workers, SkipNameValidation: &skip,
		RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](firstRetry, lastRetry)}
}

// control is what all controllers have in common: an object is looked at when its spec changes, and, if there is a look, when what
// the pool says of it does.
func control[S comparable](m manager.Manager, namespace string, object client.Object, workers int, r reconcile.Reconciler, look func(context.Context) (map[string]S, error),
	more func(*builder.Builder) *builder.Builder) error {
	changed := make(chan event.GenericEvent)
	b := builder.ControllerManagedBy(m).For(object, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WithOptions(options(workers)).
		WatchesRawSource(source.Channel(changed, &handler.EnqueueRequestForObject{}))
	if more != nil {
		b = more(b)
	}
	if err := b.Complete(r); err != nil {
		return err
	}
	return m.Add(manager.RunnableFunc(func(ctx context.Context) error {
		return watch(ctx, look, func(name string) {
			select {
			case changed <- event.GenericEvent{Object: &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}}:
			case <-ctx.Done():
			}
		})
	}))
}

// watch tells of all that the pool has once, and then of each whose state changed, or that is new or gone.
func watch[S comparable](ctx context.Context, look func(context.Context) (map[string]S, error), tell func(name string)) error {
	ticks := time.NewTicker(lookEvery)
	defer ticks.Stop()
	known := map[string]S{}
	for {
		if now, err := look(ctx); err == nil { // who shuts down says nothing
			for _, name := range differing(known, now) {
				tell(name)
			}
			known = now
		}
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// differing lists the keys whose values are not the same, in their order.
func differing[S comparable](before, now map[string]S) []string {
	names := map[string]bool{}
	for name, s := range now {
		if old, known := before[name]; !known || old != s {
			names[name] = true
		}
	}
	for name := range before {
		if _, there := now[name]; !there {
			names[name] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}
