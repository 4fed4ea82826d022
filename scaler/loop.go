package scaler

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// Pool is what the loop needs of the owner of the Instances. Its methods do not block. Safe for concurrent use.
type Pool interface {
	// Functions returns every Function, or those of the names that there are, with its spec and, in its status, how many Instances are
	// ready and starting. The loop does not change what it gets.
	Functions(names ...string) []*hearthv1.Function
	// Scale asks for a number of Instances, with the reason for people. The pool keeps it between the Function's bounds and
	// chooses which Instances.
	Scale(function string, desired int, reason string)
	// Acknowledge passes on which version of the endpoints a gateway acts upon and how many requests it has in flight, by
	// Instance; one that is left out has none.
	Acknowledge(subscriber string, version int64, inFlight map[string]int32)
}

// Config says what a Loop works with. Only Pool must be set.
type Config struct {
	Pool Pool
	// Interval between decisions; default 1 s.
	Interval time.Duration
	// Utilisation of an Instance's concurrency that is aimed at; default DefaultUtilisation.
	Utilisation float64
	Logger      *slog.Logger
	Registerer  prometheus.Registerer
}

// Loop takes gateways' reports (it is the LoadService) and decides. Use New. Safe for concurrent use.
type Loop struct {
	pool        Pool
	interval    time.Duration
	utilisation float64
	log         *slog.Logger
	metrics     *metrics

	mu     sync.Mutex // guards what follows
	loads  loads
	states map[string]State
	said   map[string]int
	widths map[string]time.Duration // of the windows, by Function
}

// New makes a Loop; Run starts it.
func New(c Config) (*Loop, error) {
	if c.Pool == nil {
		return nil, errors.New("scaler: Config.Pool is not set")
	}
	if c.Utilisation < 0 || c.Utilisation > 1 {
		return nil, errors.New("scaler: Config.Utilisation is not between 0 and 1")
	}
	if c.Utilisation == 0 {
		c.Utilisation = DefaultUtilisation
	}
	if c.Interval <= 0 {
		c.Interval = time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Loop{
		pool: c.Pool, interval: c.Interval, utilisation: c.Utilisation, log: c.Logger, metrics: newMetrics(c.Registerer),
		loads: loads{gateways: map[string]*gateway{}}, states: map[string]State{}, said: map[string]int{},
		widths: map[string]time.Duration{},
	}, nil
}

// Run decides each interval until ctx is done.
func (l *Loop) Run(ctx context.Context) error {
	ticker := time.NewTicker(l.interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-ticker.C:
			l.tick(now)
		}
	}
}

// Report is LoadService's only call.
func (l *Loop) Report(_ context.Context, req *connect.Request[hearthv1.ReportRequest]) (*connect.Response[hearthv1.ReportResponse], error) {
	r := req.Msg
	if err := check(r); err != nil {
		l.metrics.reports.WithLabelValues("invalid").Inc()
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	now := time.Now()
	woken, err := l.take(now, r)
	if err != nil {
		l.metrics.reports.WithLabelValues("refused").Inc()
		return nil, err
	}
	l.metrics.reports.WithLabelValues("ok").Inc()
	if r.GetVersion() > 0 {
		l.pool.Acknowledge(r.GetSubscriber(), r.GetVersion(), inFlight(r))
	}
	if len(woken) > 0 {
		l.wake(now, woken)
	}
	return connect.NewResponse(&hearthv1.ReportResponse{}), nil
}

func (l *Loop) take(now time.Time, r *hearthv1.ReportRequest) (woken []string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.loads.gateways[r.GetSubscriber()] == nil && len(l.loads.gateways) >= maxGateways {
		return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("too many gateways report; give each one a fixed name"))
	}
	l.refresh(r)
	return l.loads.add(now, r, func(function string) time.Duration { return l.widths[function] }), nil
}

// refresh learns of Functions that are newer than the last tick. Guarded by mu; the pool does not block.
func (l *Loop) refresh(r *hearthv1.ReportRequest) {
	var unknown []string
	for _, load := range r.GetLoads() {
		if l.widths[load.GetFunction()] == 0 {
			unknown = append(unknown, load.GetFunction())
		}
	}
	if len(unknown) == 0 {
		return
	}
	for _, f := range l.pool.Functions(unknown...) {
		l.widths[f.GetName()] = PolicyOf(f.GetSpec().GetScaling()).Window
	}
}

func inFlight(r *hearthv1.ReportRequest) map[string]int32 {
	all := map[string]int32{}
	for _, l := range r.GetLoads() {
		for id, n := range l.GetInFlight() {
			all[id] += n
		}
	}
	return all
}

// tick decides for every Function.
func (l *Loop) tick(now time.Time) {
	functions := l.pool.Functions()
	l.mu.Lock()
	policies := make(map[string]Policy, len(functions))
	clear(l.widths)
	for _, f := range functions {
		policies[f.GetName()] = l.policy(f)
		l.widths[f.GetName()] = policies[f.GetName()].Window
	}
	l.loads.sweep(now, policies)
	for name := range l.states {
		if _, ok := policies[name]; !ok {
			delete(l.states, name)
			delete(l.said, name)
			l.metrics.desired.DeleteLabelValues(name)
		}
	}
	l.metrics.gateways.Set(float64(len(l.loads.gateways)))
	l.mu.Unlock()
	l.decide(now, functions)
}

// wake decides at once for Functions that were idle.
func (l *Loop) wake(now time.Time, names []string) {
	l.decide(now, l.pool.Functions(names...))
}

func (l *Loop) decide(now time.Time, functions []*hearthv1.Function) {
	for _, f := range functions {
		d, changed := l.one(now, f)
		if changed {
			l.log.Info("scale", "function", f.GetName(), "desired", d.Desired, "reason", d.Reason)
		}
		l.pool.Scale(f.GetName(), d.Desired, d.Reason)
	}
}

func (l *Loop) one(now time.Time, f *hearthv1.Function) (d Decision, changed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	name := f.GetName()
	o := l.loads.observe(now, name)
	o.Ready, o.Starting = int(f.GetStatus().GetReady()), int(f.GetStatus().GetStarting())
	d, l.states[name] = Decide(now, l.policy(f), l.states[name], o)
	before, known := l.said[name]
	l.said[name] = d.Desired
	l.metrics.desired.WithLabelValues(name).Set(float64(d.Desired))
	l.metrics.decisions.Inc()
	return d, before != d.Desired || !known && d.Desired > 0
}

func (l *Loop) policy(f *hearthv1.Function) Policy {
	p := PolicyOf(f.GetSpec().GetScaling())
	p.Utilisation = l.utilisation
	return p
}
