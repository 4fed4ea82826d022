package cluster

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// container of an Instance's pod that has the function's output as its own.
const container = "function"

// maxLine is the longest line of a log that is one: longer ones are split, as nodeagent splits them.
const maxLine = 64 << 10

// pods are those of Instances, of a Function or all, oldest first.
func (c *Client) pods(ctx context.Context, function string) ([]corev1.Pod, error) {
	var list corev1.PodList
	if err := c.api.List(ctx, &list, client.InNamespace(c.namespace), instancesOf(function)); err != nil {
		return nil, c.coded(err)
	}
	slices.SortFunc(list.Items, func(a, b corev1.Pod) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	return list.Items, nil
}

func instancesOf(function string) client.ListOption {
	if function == "" {
		return client.HasLabels{crd.LabelInstance}
	}
	return client.MatchingLabels{crd.LabelFunction: function}
}

// Instances are those of a Function, or all: what their pods say of them.
func (c *Client) Instances(ctx context.Context, function string) ([]*hearthv1.Instance, error) {
	pods, err := c.pods(ctx, function)
	if err != nil {
		return nil, err
	}
	out := make([]*hearthv1.Instance, 0, len(pods))
	for i := range pods {
		out = append(out, instanceMessage(&pods[i]))
	}
	return out, nil
}

func instanceMessage(p *corev1.Pod) *hearthv1.Instance {
	return &hearthv1.Instance{
		Id: p.Name, Node: p.Spec.NodeName, State: stateOf(p), Degree: degreeOf(p), Address: p.Status.PodIP, Function: p.Labels[crd.LabelFunction],
		Revision: p.Labels[crd.LabelRevision], Runtime: p.Labels[runtimeLabel], CreatedAt: timestamppb.New(p.CreationTimestamp.Time), Pod: p.Name,
	}
}

// stateOf is as much as a pod tells of its Instance's state.
func stateOf(p *corev1.Pod) hearthv1.State {
	switch {
	case p.DeletionTimestamp != nil:
		return hearthv1.State_STATE_DRAINING
	case p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed:
		return hearthv1.State_STATE_GONE
	case p.Labels[crd.LabelFunction] != "":
		return hearthv1.State_STATE_SERVING
	case isReady(p):
		return hearthv1.State_STATE_WARM
	}
	return hearthv1.State_STATE_CREATING
}

func degreeOf(p *corev1.Pod) hearthv1.Degree {
	if p.Labels[runtimeLabel] != "" {
		return hearthv1.Degree_DEGREE_RUNTIME
	}
	return hearthv1.Degree_DEGREE_SANDBOX
}

func isReady(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// logs is one call of Logs.
type logs struct {
	client *Client
	req    *hearthv1.LogsRequest
	mu     sync.Mutex // lets one line at a time through
	line   func(*hearthv1.LogsResponse) error
}

// Logs gives each line that a Function's Instances have written, Instance by Instance; with follow as they come, and of new Instances too,
// until ctx is done. Errors: NotFound (there is no such Instance).
func (c *Client) Logs(ctx context.Context, req *hearthv1.LogsRequest, line func(*hearthv1.LogsResponse) error) error {
	pods, version, err := c.podsOf(ctx, req)
	if err != nil {
		return err
	}
	l := &logs{client: c, req: req, line: line}
	group, ctx := errgroup.WithContext(ctx)
	if !req.GetFollow() {
		group.SetLimit(1)
	}
	known := map[string]bool{}
	for _, name := range pods {
		known[name] = true
		group.Go(func() error { return l.pod(ctx, name, req.GetTail()) })
	}
	if req.GetFollow() && req.GetInstanceId() == "" {
		group.Go(func() error { return l.watch(ctx, group, version, known) })
	}
	return c.coded(group.Wait())
}

// podsOf are the names of the pods whose logs are asked for, and the version of that list.
func (c *Client) podsOf(ctx context.Context, req *hearthv1.LogsRequest) (names []string, version string, err error) {
	if id := req.GetInstanceId(); id != "" {
		var pod corev1.Pod
		err := c.api.Get(ctx, client.ObjectKey{Namespace: c.namespace, Name: id}, &pod)
		if err == nil && pod.Labels[crd.LabelFunction] != req.GetFunction() {
			err = apierrors.NewNotFound(corev1.Resource("pods"), id)
		}
		return []string{id}, "", c.missing(err, "instance of "+req.GetFunction(), id)
	}
	var function crd.Function
	if err := c.api.Get(ctx, client.ObjectKey{Namespace: c.namespace, Name: req.GetFunction()}, &function); err != nil {
		return nil, "", c.missing(err, "function", req.GetFunction())
	}
	var list corev1.PodList
	if err := c.api.List(ctx, &list, client.InNamespace(c.namespace), instancesOf(req.GetFunction())); err != nil {
		return nil, "", c.coded(err)
	}
	slices.SortFunc(list.Items, func(a, b corev1.Pod) int { return a.CreationTimestamp.Compare(b.CreationTimestamp.Time) })
	for _, p := range list.Items {
		names = append(names, p.Name)
	}
	return names, list.ResourceVersion, nil
}

// watch follows the Instances that become the Function's.
func (l *logs) watch(ctx context.Context, group *errgroup.Group, version string, known map[string]bool) error {
	for ctx.Err() == nil {
		w, err := l.client.api.Watch(ctx, &corev1.PodList{}, client.InNamespace(l.client.namespace), instancesOf(l.req.GetFunction()),
			&client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: version}})
		if err != nil {
			return err
		}
		for event := range w.ResultChan() {
			pod, ok := event.Object.(*corev1.Pod)
			if !ok || event.Type != watch.Added || known[pod.Name] {
				continue
			}
			known[pod.Name] = true
			group.Go(func() error { return l.pod(ctx, pod.Name, 0) })
		}
		w.Stop()
		version = "" // the server ends watches now and then: begin again with what is there, which known tells from what is new
	}
	return ctx.Err()
}

// pod gives the lines of one Instance. One that ends meanwhile, or whose container has not begun, has no more.
func (l *logs) pod(ctx context.Context, name string, tail int32) error {
	body, err := l.client.openLog(ctx, name, l.req.GetFollow(), tail)
	if err != nil || body == nil {
		return err
	}
	defer body.Close()
	in := bufio.NewReaderSize(body, maxLine)
	for {
		text, err := in.ReadSlice('\n')
		if len(text) > 0 {
			if sent := l.send(name, bytes.TrimSuffix(text, []byte("\n"))); sent != nil {
				return sent
			}
		}
		switch {
		case err == nil || errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		default:
			return fmt.Errorf("log of instance %s: %w", name, err)
		}
	}
}

func (l *logs) send(instance string, text []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.line(&hearthv1.LogsResponse{InstanceId: instance, Line: bytes.Clone(text)})
}

// openLog asks the API server, and so the kubelet, for a pod's log; nil if there is none.
func (c *Client) openLog(ctx context.Context, pod string, follow bool, tail int32) (io.ReadCloser, error) {
	query := url.Values{"container": {container}}
	if follow {
		query.Set("follow", "true")
	}
	if tail > 0 {
		query.Set("tailLines", strconv.Itoa(int(tail)))
	}
	resp, err := c.get(ctx, "api/v1/namespaces/"+c.namespace+"/pods/"+pod+"/log?"+query.Encode())
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusBadRequest { // gone, or not begun
		return nil, nil
	}
	return nil, answered(resp, "get the log of pod "+pod)
}
