package scaler_test

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/scaler"
)

func seconds(n int) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Second) }

// fakePool does at once what it is told. Each Function begins with one Instance: the one that a gateway claimed for its first
// request.
type fakePool struct {
	mu        sync.Mutex
	functions map[string]*hearthv1.Function
	history   map[string][]int
	acks      []string
	reasons   []string
	takes     time.Duration // for each word
}

func newFakePool(scalings map[string]*hearthv1.Scaling) *fakePool {
	p := &fakePool{functions: map[string]*hearthv1.Function{}, history: map[string][]int{}}
	for name, s := range scalings {
		p.functions[name] = &hearthv1.Function{Name: name, Spec: &hearthv1.FunctionSpec{Scaling: s}}
		p.history[name] = []int{1}
	}
	return p
}

func (p *fakePool) Functions(names ...string) (all []*hearthv1.Function) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.functions {
		if len(names) > 0 && !slices.Contains(names, f.Name) {
			continue
		}
		n := int32(0)
		if h := p.history[f.Name]; len(h) > 0 {
			n = int32(h[len(h)-1])
		}
		all = append(all, &hearthv1.Function{Name: f.Name, Spec: f.Spec, Status: &hearthv1.FunctionStatus{Ready: n}})
	}
	return all
}

func (p *fakePool) Scale(name string, desired int, reason string) {
	time.Sleep(p.takes)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.history[name], p.reasons = append(p.history[name], desired), append(p.reasons, reason)
}

func (p *fakePool) Acknowledge(name string, version int64, inFlight map[string]int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.acks = append(p.acks, fmt.Sprint(name, version, slices.Sorted(maps.Keys(inFlight))))
}

func (p *fakePool) now(name string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if h := p.history[name]; len(h) > 0 {
		return h[len(h)-1]
	}
	return -1
}

func loop(t *testing.T, p *fakePool, test func(l *scaler.Loop)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l, err := scaler.New(scaler.Config{Pool: p})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- l.Run(ctx) }()
		test(l)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func report(t *testing.T, l *scaler.Loop, gateway string, loads ...*hearthv1.Load) {
	t.Helper()
	_, err := l.Report(t.Context(), connect.NewRequest(&hearthv1.ReportRequest{Subscriber: gateway, Version: 7, Loads: loads}))
	if err != nil {
		t.Fatalf("report: %v", err)
	}
}

// each reports one load each second for a while.
func each(t *testing.T, l *scaler.Loop, gateway string, long time.Duration, c float64) {
	for end := time.Now().Add(long); time.Now().Before(end); {
		time.Sleep(time.Second)
		load := &hearthv1.Load{Function: "hello", Concurrency: c, Interval: seconds(1)}
		if c > 0 {
			load.InFlight = map[string]int32{"i": int32(math.Ceil(c))}
		}
		report(t, l, gateway, load)
	}
}

func TestFirstRequestDecidesAtOnce(t *testing.T) {
	p := newFakePool(map[string]*hearthv1.Scaling{"hello": nil})
	loop(t, p, func(l *scaler.Loop) {
		report(t, l, "g", &hearthv1.Load{Function: "hello", Requests: 1, Queued: 1})
		if len(p.history["hello"]) < 2 {
			t.Error("no decision at once")
		}
		if !slices.Equal(p.acks, []string{"g7 []"}) {
			t.Errorf("acknowledged %v", p.acks)
		}
	})
}

// While many Functions are decided for, reports come in. They are no measurements of the future, of which something is missing.
func TestReportsDuringARound(t *testing.T) {
	few := &hearthv1.Scaling{Window: seconds(4)}
	p := newFakePool(map[string]*hearthv1.Scaling{"hello": few, "other": few})
	p.takes = 1500 * time.Millisecond
	loop(t, p, func(l *scaler.Loop) {
		for range 30 {
			time.Sleep(time.Second)
			report(t, l, "g", &hearthv1.Load{Function: "hello", Concurrency: 1, Interval: seconds(1)}, &hearthv1.Load{Function: "other", Concurrency: 1, Interval: seconds(1)})
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, reason := range p.reasons[len(p.reasons)/2:] {
			if strings.HasPrefix(reason, "held") {
				t.Error(reason)
			}
		}
	})
}

func TestUpDownAndToZero(t *testing.T) {
	p := newFakePool(map[string]*hearthv1.Scaling{"hello": {Concurrency: 1, Window: seconds(20), Grace: seconds(10)}})
	loop(t, p, func(l *scaler.Loop) {
		each(t, l, "g", 30*time.Second, 4)
		if got := p.now("hello"); got != 4 {
			t.Errorf("desired %d under 4", got)
		}
		each(t, l, "g", 15*time.Second, 1)
		if got := p.now("hello"); got != 4 {
			t.Errorf("desired %d, the window still has the busy time", got)
		}
		each(t, l, "g", 15*time.Second, 1)
		if got := p.now("hello"); got != 1 {
			t.Errorf("desired %d under 1", got)
		}
		each(t, l, "g", 28*time.Second, 0)
		if got := p.now("hello"); got != 1 {
			t.Errorf("desired %d within the grace", got)
		}
		each(t, l, "g", 5*time.Second, 0)
		if got := p.now("hello"); got != 0 {
			t.Errorf("desired %d after window and grace", got)
		}
	})
}

func TestAReportWithoutAFunctionSaysThatThereIsNone(t *testing.T) {
	p := newFakePool(map[string]*hearthv1.Scaling{"hello": {Window: seconds(10), Grace: seconds(5)}})
	loop(t, p, func(l *scaler.Loop) {
		each(t, l, "g", 10*time.Second, 4)
		for range 20 {
			time.Sleep(time.Second)
			report(t, l, "g")
		}
		if got := p.now("hello"); got != 0 {
			t.Errorf("desired %d", got)
		}
	})
}

func TestMissingReportsHold(t *testing.T) {
	p := newFakePool(map[string]*hearthv1.Scaling{"hello": {Concurrency: 1, Window: seconds(10), Grace: seconds(5)}})
	loop(t, p, func(l *scaler.Loop) {
		each(t, l, "g", 15*time.Second, 4)
		time.Sleep(10 * time.Minute)
		if got := p.now("hello"); got != 4 {
			t.Errorf("desired %d after silence of all gateways", got)
		}
		each(t, l, "g", 30*time.Second, 0)
		if got := p.now("hello"); got != 0 {
			t.Errorf("desired %d after a measured silence", got)
		}
	})
}

func TestOneMissingGatewayHoldsForAMinute(t *testing.T) {
	p := newFakePool(map[string]*hearthv1.Scaling{"hello": {Concurrency: 1, Window: seconds(10), Grace: seconds(5)}})
	loop(t, p, func(l *scaler.Loop) {
		for range 15 {
			time.Sleep(time.Second)
			for _, g := range []string{"a", "b"} {
				report(t, l, g, &hearthv1.Load{Function: "hello", Concurrency: 2, Interval: seconds(1), InFlight: map[string]int32{"i": 2}})
			}
		}
		if got := p.now("hello"); got != 4 {
			t.Errorf("desired %d for two gateways with 2 each", got)
		}
		each(t, l, "a", 50*time.Second, 0)
		if got := p.now("hello"); got != 4 {
			t.Errorf("desired %d while a gateway is missing", got)
		}
		each(t, l, "a", 40*time.Second, 0)
		if got := p.now("hello"); got != 0 {
			t.Errorf("desired %d after the missing one was forgotten", got)
		}
	})
}

func TestReplay(t *testing.T) {
	p := newFakePool(map[string]*hearthv1.Scaling{"hello": {Concurrency: 10, Max: 50, Window: seconds(30), Grace: seconds(15)}})
	loop(t, p, func(l *scaler.Loop) {
		short, demand, over := 0.0, 0.0, 0.0
		for second := range 600 {
			c := 40 + 35*math.Sin(float64(second)/60)
			each(t, l, "g", time.Second, c)
			ready := float64(p.now("hello") * 10)
			short, demand, over = short+max(0, c-ready), demand+c, over+ready
		}
		if short/demand > 0.01 || over/demand > 2.5 {
			t.Errorf("short by %.2f%%, %.2f of the demand provided", 100*short/demand, over/demand)
		}
	})
}

func TestBadReports(t *testing.T) {
	p := newFakePool(map[string]*hearthv1.Scaling{"hello": nil})
	loop(t, p, func(l *scaler.Loop) {
		for _, c := range []struct {
			name string
			r    *hearthv1.ReportRequest
		}{
			{"no name", &hearthv1.ReportRequest{}},
			{"not a number", &hearthv1.ReportRequest{Subscriber: "g", Loads: []*hearthv1.Load{{Function: "hello", Concurrency: math.NaN()}}}},
			{"negative", &hearthv1.ReportRequest{Subscriber: "g", Loads: []*hearthv1.Load{{Function: "hello", Concurrency: -1}}}},
			{"no function", &hearthv1.ReportRequest{Subscriber: "g", Loads: []*hearthv1.Load{{}}}},
			{"interval", &hearthv1.ReportRequest{Subscriber: "g", Loads: []*hearthv1.Load{{Function: "hello", Interval: seconds(-1)}}}},
		} {
			if _, err := l.Report(t.Context(), connect.NewRequest(c.r)); connect.CodeOf(err) != connect.CodeInvalidArgument {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		report(t, l, "g", &hearthv1.Load{Function: "nobody", Queued: 5})
		if got := p.now("nobody"); got != -1 {
			t.Errorf("desired %d of an unknown function", got)
		}
		// The window of a strange clock: huge intervals do not count more than the window.
		report(t, l, "g", &hearthv1.Load{Function: "hello", Concurrency: 1, Interval: durationpb.New(1 << 62)})
	})
}

func FuzzReport(f *testing.F) {
	f.Add("g", "hello", 1.5, int64(1), int32(1), int64(1e9))
	f.Add("", "", math.Inf(1), int64(-1), int32(-1), int64(math.MinInt64))
	f.Fuzz(func(t *testing.T, subscriber, function string, c float64, requests int64, queued int32, interval int64) {
		p := newFakePool(map[string]*hearthv1.Scaling{"hello": nil})
		l, err := scaler.New(scaler.Config{Pool: p})
		if err != nil {
			t.Fatal(err)
		}
		_, _ = l.Report(t.Context(), connect.NewRequest(&hearthv1.ReportRequest{Subscriber: subscriber, Loads: []*hearthv1.Load{
			{Function: function, Concurrency: c, Requests: requests, Queued: queued, Interval: durationpb.New(time.Duration(interval)), InFlight: map[string]int32{"i": queued}}}}))
		if got := p.now("hello"); got > 10 {
			t.Errorf("desired %d is over the maximum", got)
		}
	})
}
