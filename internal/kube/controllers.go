package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect"
	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"
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

// Controllers keep a term's pool in step with the custom resources, and tell in these what came of it. All must be set.
type Controllers struct {
	// Namespace of all that Hearth runs.
	Namespace string
	Functions Functions
	Runtimes  Runtimes
	Pools     WarmPools
	// URL of a Function at the gateway.
	URL    func(function string) string
	Logger *slog.Logger
}

// Run works until ctx ends. The cache runs already and goes on afterwards; it is bounded to the namespace, and its scheme knows
// Kubernetes' kinds and Hearth's.
func (c Controllers) Run(ctx context.Context, config *rest.Config, scheme *runtime.Scheme, seen cache.Cache) error {
	m, err := manager.New(config, manager.Options{
		Scheme: scheme, Logger: logr.FromSlogHandler(c.Logger.Handler()), Metrics: metricsserver.Options{BindAddress: "0"},
		NewCache: func(*rest.Config, cache.Options) (cache.Cache, error) { return running{seen}, nil },
	})
	if err != nil {
		return fmt.Errorf("make controllers: %w", err)
	}
	o := objects{Client: m.GetClient(), live: m.GetAPIReader(), events: m.GetEventRecorder("hearth-poolmanager")}
	if err := errors.Join(
		c.addFunctions(m, &functions{objects: o, pool: c.Functions, url: c.URL, applied: map[types.NamespacedName]string{}}),
		c.addRuntimes(m, &runtimes{objects: o, pool: c.Runtimes, applied: map[string]string{}}),
		c.addWarmPools(m, &warmPools{objects: o, pool: c.Pools}),
		addRevisions(m, &revisions{o}),
	); err != nil {
		return fmt.Errorf("make controllers: %w", err)
	}
	return m.Start(ctx)
}

// running is a cache that somebody else has started.
type running struct{ cache.Cache }

// Start waits, as a manager expects of a cache.
func (running) Start(ctx context.Context) error {
	<-ctx.Done()
	return nil
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

// control is what all controllers have in common: an object is looked at when it changes, and, if there is a look, when what
// the pool says of it does.
func control[S comparable](m manager.Manager, namespace string, object client.Object, workers int, r reconcile.Reconciler, look func(context.Context) (map[string]S, error),
	more func(*builder.Builder) *builder.Builder) error {
	changed := make(chan event.GenericEvent)
	// A status that changed is looked at too, also if it was us: a cache that was behind, as after an outage of the API server, may have
	// had us take an older one for what is written, and nothing else would tell us.
	b := builder.ControllerManagedBy(m).For(object, builder.WithPredicates(predicate.ResourceVersionChangedPredicate{})).
		WithOptions(options(workers)).
		WatchesRawSource(source.Channel(changed, &handler.EnqueueRequestForObject{}))
	if more != nil {
		b = more(b)
	}
	if err := b.Complete(r); err != nil {
		return err
	}
	return m.Add(manager.RunnableFunc(func(ctx context.Context) error {
		return follow(ctx, look, func(name string) {
			select {
			case changed <- event.GenericEvent{Object: &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}}:
			case <-ctx.Done():
			}
		})
	}))
}

// follow tells of all that the pool has once, and then of each whose state changed, or that is new or gone.
func follow[S comparable](ctx context.Context, look func(context.Context) (map[string]S, error), tell func(name string)) error {
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
