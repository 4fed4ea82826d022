package scale_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/test/cluster"
)

var (
	nodes     = flag.Int("nodes", 500, "nodes that are simulated")
	functions = flag.Int("functions", 2000, "Functions that are applied")
)

// What must hold.
const (
	settleTime  = 3 * time.Minute
	peakBytes   = 400 << 20
	decideTime  = 2 * time.Millisecond // of 99 in 100
	takeOver    = 5 * time.Second
	perSecond   = 50 // claims
	decideCount = 30 * perSecond
)

// TestScale has many nodes and Functions, from nothing to two leaders at a time. It takes some minutes.
func TestScale(t *testing.T) {
	cluster.Skip(t)
	if _, err := os.Stat(poolmanager); err != nil {
		t.Skipf("needs poolmanager, which `make build` makes: %v", err)
	}
	begun := time.Now()
	b := newBed(t, *nodes)
	t.Logf("%d nodes are there after %v", *nodes, time.Since(begun).Round(time.Second))
	s := &state{bed: b}
	for _, part := range []struct {
		name string
		test func(*state, *testing.T)
	}{{"Settle", (*state).settle}, {"Decide", (*state).decide}, {"LeaderKilled", (*state).leaderKilled}, {"TwoLeaders", (*state).twoLeaders}} {
		if !t.Run(part.name, func(sub *testing.T) { s.t = t; part.test(s, sub) }) && s.url == "" {
			break // there is nothing to claim
		}
	}
}

// state is what the parts hand on.
type state struct {
	*bed
	t        *testing.T // of all parts: what they start lives on
	leader   *manager
	standby  *manager
	url      string
	idle     []string // Functions at zero that nobody has asked for
	asked    []string // and those that somebody has, once
	expected map[string]int32
}

// code is a package that only its digest is known of.
func code(n int) *crd.Code {
	return &crd.Code{Package: fmt.Sprintf("registry.example/code/f%d@sha256:%064x", n, n+1), Handler: "main.handle"}
}

// objects are the mixture: most Functions at zero, of two Runtimes or images, and some with a minimum; what waits for them differs by zone.
func (s *state) objects() (all []client.Object) {
	for _, name := range []string{"python", "node"} {
		all = append(all, &crd.Runtime{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
			Spec: crd.RuntimeSpec{Image: "registry.example/runtimes/" + name + "@sha256:" + strings.Repeat("0", 64)}})
	}
	one, two := int32(1), int32(2)
	for name, spec := range map[string]crd.WarmPoolSpec{
		"python":    {Runtime: "python", Size: &two},
		"node":      {Runtime: "node", Size: &one, NodeSelector: map[string]string{zoneLabel: "a"}},
		"sandboxes": {Size: &one},
	} {
		all = append(all, &crd.WarmPool{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: spec})
	}
	for n := range *functions {
		f := &crd.Function{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("f-%04d", n)}}
		f.Spec.Scaling = crd.Scaling{Max: 1, Window: &metav1.Duration{Duration: 4 * time.Second}, Grace: &metav1.Duration{}}
		switch {
		case n%10 == 0:
			f.Spec.Image = "registry.example/images/" + f.Name + "@sha256:" + strings.Repeat("1", 64)
		case n%10 < 3:
			f.Spec.Runtime, f.Spec.Code = "node", code(n)
		default:
			f.Spec.Runtime, f.Spec.Code = "python", code(n)
		}
		if n%20 == 19 {
			f.Spec.Scaling.Min = 1
		} else {
			s.idle = append(s.idle, f.Name)
		}
		all = append(all, f)
	}
	return all
}

// settle applies everything to poolmanagers that begin with nothing.
func (s *state) settle(t *testing.T) {
	before := s.writes(t)
	begun := time.Now()
	s.leader = s.startManager(s.t)
	s.await(t, "a leader", func(ctx context.Context) error { return want("leaders", int(min(1, s.leader.leads(ctx))), 1) })
	s.standby = s.startManager(s.t)
	var work errgroup.Group
	work.SetLimit(8)
	for _, o := range s.objects() {
		work.Go(func() error { return s.api.Create(t.Context(), o) })
	}
	s.must(t, work.Wait())
	t.Logf("applied after %v", time.Since(begun).Round(100*time.Millisecond))
	s.must(t, s.list(t.Context())) // watch from here on
	profiled := false
	s.awaitFor(t, 2*settleTime, "a steady state", func(ctx context.Context) error {
		if !profiled && time.Since(begun) > 20*time.Second {
			profiled = true
			s.leader.profile(t, "settle.pprof", "profile?seconds=15")
		}
		return s.steady(ctx)
	})
	took := time.Since(begun)
	peak, cpu := s.leader.usage(t)
	standby, _ := s.standby.usage(t)
	t.Logf("%d Functions on %d nodes are in a steady state after %v; poolmanager: peak memory %d MiB (standby %d MiB), processor %v",
		*functions, *nodes, took.Round(100*time.Millisecond), peak>>20, standby>>20, cpu)
	s.tellWrites(t, before)
	s.leader.profile(t, "settled.heap", "heap")
	if took > settleTime {
		t.Errorf("it took %v, more than %v", took, settleTime)
	}
	s.bound(t)
}

// bound checks how much memory poolmanagers have had.
func (s *state) bound(t *testing.T) {
	t.Helper()
	for _, m := range []*manager{s.leader, s.standby} {
		if peak, _ := m.usage(t); peak >= peakBytes {
			t.Errorf("a poolmanager had %d MiB, not less than %d MiB", peak>>20, peakBytes>>20)
		}
	}
}

func (s *state) tellWrites(t *testing.T, before map[string]float64) {
	t.Helper()
	now := s.writes(t)
	total := 0.0
	for _, what := range slices.Sorted(maps.Keys(now)) {
		if n := now[what] - before[what]; n > 0 {
			total += n
			t.Logf("%7.0f %s", n, what)
		}
	}
	t.Logf("%7.0f writes to the API server by all, kubelets and scheduler too", total)
}

// list has the cache hold what steady looks at.
func (s *state) list(ctx context.Context) error {
	return errors.Join(s.seen.List(ctx, &crd.FunctionList{}), s.seen.List(ctx, &crd.WarmPoolList{}))
}

// steady says what is missing.
func (s *state) steady(ctx context.Context) error {
	var fs crd.FunctionList
	var ps crd.WarmPoolList
	if err := errors.Join(s.seen.List(ctx, &fs), s.seen.List(ctx, &ps)); err != nil {
		return err
	}
	ready := 0
	for _, f := range fs.Items {
		c := apimeta.FindStatusCondition(f.Status.Conditions, crd.ConditionReady)
		if c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == f.Generation && f.Status.ObservedGeneration == f.Generation && f.Status.Ready >= f.Spec.Scaling.Min {
			ready++
		}
	}
	warm, desired := 0, 0
	for _, p := range ps.Items {
		warm += int(min(p.Status.Warm, p.Status.Desired))
		desired += int(p.Status.Desired)
		if p.Status.Nodes == 0 {
			desired++
		}
	}
	per := *nodes*3 + (*nodes+2)/3
	return errors.Join(want("Functions are ready", ready, *functions), want("Instances wait", warm, per), want("Instances are to wait", desired, per))
}

// decide claims for Functions at zero, and looks at how long it took to decide which Instance.
func (s *state) decide(t *testing.T) {
	s.url = s.startGateway(s.t)
	before, writes := s.leader.histogram(t, "hearth_pool_decide_seconds"), s.writes(t)
	_, cpu := s.leader.usage(t)
	n := s.ledger.len()
	var profiling sync.WaitGroup
	profiling.Go(func() { s.leader.profile(t, "claims.pprof", "profile?seconds=20") })
	s.asked, s.idle = slices.Clone(s.idle[:decideCount]), slices.Clone(s.idle[decideCount:])
	r := s.ask(t, s.asked)
	profiling.Wait()
	r.check(t, s.ledger.since(n))
	peak, used := s.leader.usage(t)
	t.Logf("poolmanager: peak memory %d MiB, processor %v meanwhile", peak>>20, used-cpu)
	s.tellWrites(t, writes)
	p50, p99 := s.quantiles(t, before)
	t.Logf("a decision took %v at p50, %v at p99, or less", p50, p99)
	if p99 > decideTime {
		t.Errorf("a decision took up to %v at p99, more than %v", p99, decideTime)
	}
	s.bound(t)
}

func (s *state) quantiles(t *testing.T, before map[string]float64) (p50, p99 time.Duration) {
	t.Helper()
	now := s.leader.histogram(t, "hearth_pool_decide_seconds")
	total := now["+Inf"] - before["+Inf"]
	if total < decideCount*9/10 {
		t.Errorf("only %.0f decisions were taken at once: they say nothing", total)
	}
	at := func(q float64) time.Duration {
		best := math.Inf(1)
		for text := range now {
			bound, err := strconv.ParseFloat(text, 64)
			if err == nil && now[text]-before[text] >= q*total {
				best = min(best, bound)
			}
		}
		return time.Duration(min(best, 1e6) * float64(time.Second))
	}
	return at(0.5), at(0.99)
}

// result is what became of requests, one to each Function.
type result struct {
	mu     sync.Mutex // guards what follows
	took   []time.Duration
	faults []string
	asked  map[string]bool
}

// ask sends one request to each Function, so many a second, whether others are answered or not.
func (s *state) ask(t *testing.T, names []string) *result {
	t.Helper()
	r := &result{asked: map[string]bool{}}
	tick := time.NewTicker(time.Second / perSecond)
	defer tick.Stop()
	var all sync.WaitGroup
	defer all.Wait()
	for _, name := range names {
		r.asked[name] = true
		all.Go(func() { r.one(t.Context(), s.url+name+"/") })
		<-tick.C
	}
	return r
}

func (r *result) one(ctx context.Context, url string) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	err := func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %.300s", resp.Status, body)
		}
		return err
	}()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.took = append(r.took, time.Since(begun))
	if err != nil {
		r.faults = append(r.faults, fmt.Sprintf("%s after %v: %v", begun.Format("15:04:05.000"), time.Since(begun).Round(time.Millisecond), err))
	}
}

// check wants every request answered, one claim for each Function, and no Instance that two have had.
func (r *result) check(t *testing.T, claims []claimed) {
	t.Helper()
	for _, f := range r.faults[:min(len(r.faults), 10)] {
		t.Error(f)
	}
	had, of, scaled := map[string]string{}, map[string][]claimed{}, 0
	for _, c := range claims {
		if c.stale {
			continue
		}
		if strings.HasPrefix(c.claim, "s-") { // nobody's, but the scaler's
			scaled++
		} else if r.asked[c.function] {
			of[c.function] = append(of[c.function], c)
		}
		if other := had[c.instance]; other != "" && other != c.function {
			t.Errorf("instance %s was given to %s and to %s", c.instance, other, c.function)
		}
		had[c.instance] = c.function
	}
	wrong := 0
	for name := range r.asked {
		if n := len(of[name]); n != 1 && wrong < 10 {
			wrong++
			t.Errorf("%s was asked once and claimed %d times: %+v", name, n, of[name])
		}
	}
	slices.Sort(r.took)
	t.Logf("%d requests to Functions at zero, %d without an answer (and %d starts of the scaler's): p50 %v, p99 %v, slowest %v", len(r.took), len(r.faults), scaled,
		r.took[len(r.took)/2].Round(time.Millisecond/10), r.took[len(r.took)*99/100].Round(time.Millisecond/10), r.took[len(r.took)-1].Round(time.Millisecond))
}

// atZero waits until Functions have no Instance, but frozen ones.
func (s *state) atZero(t *testing.T, names []string) {
	t.Helper()
	s.await(t, "Functions at zero", func(ctx context.Context) error {
		var fs crd.FunctionList
		if err := s.seen.List(ctx, &fs); err != nil {
			return err
		}
		up := 0
		for _, f := range fs.Items {
			if f.Status.Ready+f.Status.Starting+f.Status.Desired > 0 && slices.Contains(names, f.Name) {
				up++
			}
		}
		return want("Functions are up", up, 0)
	})
}

// half are Functions of which half start from the pool, as long as there are so many, and the others are thawed.
func (s *state) half(n int) []string {
	fresh := slices.Clone(s.idle[:min(n/2, len(s.idle))])
	s.idle = slices.Clone(s.idle[len(fresh):])
	names := append(fresh, s.asked[:n-len(fresh)]...)
	s.asked = append(slices.Clone(s.asked[n-len(fresh):]), names...)
	return names
}

// leaderKilled claims all the time, while the leader is killed.
func (s *state) leaderKilled(t *testing.T) {
	names := s.half(15 * perSecond)
	s.atZero(t, names)
	n := s.ledger.len()
	epoch := s.leader.leads(t.Context())
	var killed time.Time
	var killing sync.WaitGroup
	killing.Go(func() {
		if host.Pause(t.Context(), 5*time.Second) {
			killed = time.Now()
			_ = s.leader.Process.Kill()
		}
	})
	r := s.ask(t, names)
	killing.Wait()
	claims := s.ledger.since(n)
	r.check(t, claims)
	first := time.Time{}
	for _, c := range claims {
		if c.epoch > epoch && (first.IsZero() || c.at.Before(first)) {
			first = c.at
		}
	}
	if first.IsZero() {
		t.Fatal("no claim was made after the leader was killed")
	}
	t.Logf("after the last was killed, the next leader had its term after %v, and made its first claim after %v", s.standby.began(t).Sub(killed).Round(time.Millisecond),
		first.Sub(killed).Round(time.Millisecond))
	if first.Sub(killed) > takeOver {
		t.Errorf("the take-over took %v, more than %v", first.Sub(killed), takeOver)
	}
	s.leader = s.standby
	s.standby = s.startManager(s.t)
	s.bound(t)
}

// twoLeaders stops the leader until another leads, and has both claim.
func (s *state) twoLeaders(t *testing.T) {
	old, epoch := s.leader, s.leader.leads(t.Context())
	names, late := s.half(10*perSecond), s.half(perSecond)
	s.atZero(t, slices.Concat(names, late))
	n := s.ledger.len()
	s.must(t, old.Process.Signal(syscall.SIGSTOP))
	defer func() { _ = old.Process.Signal(syscall.SIGCONT) }()
	stopped := time.Now()
	r := s.ask(t, names)
	r.check(t, s.ledger.since(n))
	if epoch >= s.standby.leads(t.Context()) {
		t.Fatal("the standby does not lead")
	}
	n = s.ledger.len()
	// These wait in the old one's socket until it goes on.
	pool := hearthv1connect.NewAllocationServiceClient(daemon.UnixClient(old.socket), "http://hearth")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	got := make([]error, len(late))
	var asking sync.WaitGroup
	for i, name := range late {
		asking.Go(func() {
			_, got[i] = pool.Allocate(ctx, connect.NewRequest(&hearthv1.AllocateRequest{Function: name}))
		})
	}
	host.Pause(t.Context(), time.Second)
	s.must(t, old.Process.Signal(syscall.SIGCONT))
	t.Logf("the leader was stopped for %v", time.Since(stopped).Round(time.Second))
	asking.Wait()
	refused, taken := 0, 0
	for _, c := range s.ledger.since(n) {
		switch {
		case c.stale:
			refused++
		case c.epoch <= epoch:
			taken++
		}
	}
	answered := 0
	for _, err := range got {
		if err == nil {
			answered++
		}
	}
	t.Logf("of the stale leader's claims %d were refused and %d taken; it answered %d of %d", refused, taken, answered, len(late))
	if taken > 0 {
		t.Errorf("%d claims of a stale leader were carried out", taken)
	}
	if refused == 0 {
		t.Log("it knew before it claimed anything")
	}
	s.awaitFor(t, 10*time.Second, "the end of the stale leader's term", func(ctx context.Context) error {
		if old.leads(ctx) == epoch {
			return errors.New("it leads on")
		}
		return nil
	})
}
