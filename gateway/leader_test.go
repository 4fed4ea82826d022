package gateway_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/gateway"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/pki"
)

// replica is one of several poolmanagers: a standby while its pool is down. One that is cut off says nothing any more, which a Watch
// notices after some time, as over a network, and calls do not.
type replica struct {
	*fakePool
	cut chan struct{}
}

const noticeTime = 3 * time.Second

func (r *replica) Allocate(ctx context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
	select {
	case <-r.cut:
		<-ctx.Done()
		return nil, connect.NewError(connect.CodeCanceled, ctx.Err())
	default:
	}
	return r.fakePool.Allocate(ctx, req)
}

func (r *replica) Watch(ctx context.Context, name string, event func(*hearthv1.WatchResponse)) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-r.cut:
		case <-done:
			return
		}
		select {
		case <-time.After(noticeTime):
			end()
		case <-done:
		}
	}()
	select {
	case <-r.cut:
		<-ctx.Done()
		return errDown
	default:
	}
	return r.fakePool.Watch(ctx, name, event)
}

// ensemble is a world of several poolmanagers, of which none leads yet.
type ensemble struct {
	*world
	mu       sync.Mutex // guards what follows
	replicas map[string]*replica
	unnamed  bool // names cannot be resolved
	leader   *gateway.Leader
}

// together runs a test with so many poolmanagers, named r0, r1 and so on, in time of its own.
func together(t *testing.T, n int, test func(t *testing.T, e *ensemble)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		e := &ensemble{replicas: map[string]*replica{}}
		for i := range n {
			e.add(fmt.Sprintf("r%d", i))
		}
		e.leader = gateway.NewLeader(gateway.LeaderConfig{
			Resolve: func(context.Context) ([]string, error) {
				e.mu.Lock()
				defer e.mu.Unlock()
				if e.unnamed {
					return nil, errors.New("no such host")
				}
				return slices.Sorted(maps.Keys(e.replicas)), nil
			},
			Connect: func(address string) (gateway.Pool, func()) {
				e.mu.Lock()
				defer e.mu.Unlock()
				return e.replicas[address], func() {}
			},
		})
		e.world = newWorldOf(t, newPipes(), newFakePool(), func(c *gateway.Config) {
			c.Pool, c.Patience = e.leader, gateway.NetworkPatience
		})
		test(t, e)
	})
}

func (e *ensemble) add(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := &replica{newFakePool(), make(chan struct{})}
	r.down = true
	e.replicas[name] = r
}

// lead has a replica lead in a term, with a function f that has no Instance.
func (e *ensemble) lead(name string, term int64, allocate func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error)) {
	r := e.replicas[name]
	r.allocate = allocate
	r.version = term << 32
	r.set("f", func(*hearthv1.Endpoints) {})
	r.lose(false)
}

// follows names the leader that allocates, or says why there is none.
func (e *ensemble) follows(t *testing.T) string {
	t.Helper()
	for range 10 {
		res, err := e.leader.Allocate(t.Context(), &hearthv1.AllocateRequest{Function: "f", Id: "who"})
		if err == nil {
			return res.GetInstance().GetId()
		}
		if !errors.Is(err, errDown) || strings.Contains(err.Error(), "no poolmanager leads") {
			return err.Error()
		}
		time.Sleep(minRetry) // it was asked before its end was noticed
	}
	return "one that is away"
}

const minRetry = 50 * time.Millisecond

// as answers with an Instance of that name.
func as(name string) func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
	return func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
		return allocated(&hearthv1.Instance{Id: name, Address: name + ":1"}), nil
	}
}

func TestLeaderIsFound(t *testing.T) {
	together(t, 3, func(t *testing.T, e *ensemble) {
		if got := e.follows(t); !strings.Contains(got, "no poolmanager leads") || !strings.Contains(got, "away") {
			t.Errorf("nobody leads: %s", got)
		}
		close(e.replicas["r0"].cut) // and costs nobody time
		e.lead("r2", 1, as("r2"))
		if got := e.follows(t); got != "r2" {
			t.Errorf("r2 leads: %s", got)
		}
		e.replicas["r2"].lose(true)
		e.lead("r1", 2, as("r1"))
		if got := e.follows(t); got != "r1" {
			t.Errorf("r1 leads: %s", got)
		}
	})
}

// A request that waits for a leader that dies without a word gets its Instance from the next one, under the same id, within 5 s.
func TestTakeOver(t *testing.T) {
	together(t, 2, func(t *testing.T, e *ensemble) {
		in, _ := e.instance(mirror{"a"})
		asked := make(chan string, 1)
		e.lead("r0", 1, func(ctx context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			asked <- req.GetId()
			<-ctx.Done() // its machine has lost its power meanwhile
			return nil, connect.NewError(connect.CodeCanceled, ctx.Err())
		})
		<-e.gw.Synced()
		begun := time.Now()
		answers := make(chan answer, 1)
		go func() { answers <- e.get("/fn/f") }()
		first := <-asked
		close(e.replicas["r0"].cut)
		time.AfterFunc(4*time.Second, func() { // the lease's time
			e.lead("r1", 2, func(_ context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
				asked <- req.GetId()
				return allocated(in), nil
			})
		})
		if a := <-answers; a.status != 200 {
			t.Errorf("%d %s", a.status, a.body)
		}
		if second := <-asked; second != first {
			t.Errorf("asked for %s and then for %s", first, second)
		}
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("it took %s", took)
		}
	})
}

// Who led before and has not heard of the next is not followed, unless there is none for long.
func TestStaleLeaderIsNotBelieved(t *testing.T) {
	together(t, 2, func(t *testing.T, e *ensemble) {
		e.lead("r1", 7, as("r1"))
		if got := e.follows(t); got != "r1" {
			t.Fatalf("r1 leads: %s", got)
		}
		e.lead("r0", 6, as("r0"))
		e.replicas["r1"].lose(true)
		time.Sleep(time.Second)
		if got := e.follows(t); !strings.Contains(got, "no poolmanager leads") {
			t.Errorf("r0 is stale: %s", got)
		}
		e.replicas["r1"].lose(false)
		time.Sleep(time.Second)
		if got := e.follows(t); got != "r1" {
			t.Errorf("r1 is back: %s", got)
		}
		e.replicas["r1"].lose(true)
		time.Sleep(10 * time.Second)
		if got := e.follows(t); got != "r0" {
			t.Errorf("terms have begun anew: %s", got)
		}
	})
}

// A leader that is cut off from its nodes but not from us, and has been replaced, is given up.
func TestDeposedLeaderIsLeft(t *testing.T) {
	together(t, 3, func(t *testing.T, e *ensemble) {
		refused := connect.NewError(connect.CodeUnavailable, errors.New("no node is connected"))
		e.lead("r0", 1, func(context.Context, *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error) {
			return nil, refused
		})
		<-e.gw.Synced()
		for range 5 { // nobody else leads, so it is followed on
			if _, err := e.leader.Allocate(t.Context(), &hearthv1.AllocateRequest{Function: "f"}); !errors.Is(err, refused) {
				t.Errorf("what it says is hidden: %v", err)
			}
			time.Sleep(time.Second)
		}
		e.lead("r2", 2, as("r2"))
		_, _ = e.leader.Allocate(t.Context(), &hearthv1.AllocateRequest{Function: "f"})
		time.Sleep(time.Second)
		if got := e.follows(t); got != "r2" {
			t.Errorf("r2 leads: %s", got)
		}
	})
}

// Poolmanagers come and go while nobody asks; when the leader dies, and names cannot be resolved any more, the others are known.
func TestAddressesAreKept(t *testing.T) {
	together(t, 1, func(t *testing.T, e *ensemble) {
		e.lead("r0", 1, as("r0"))
		<-e.gw.Synced()
		e.add("r1")
		time.Sleep(time.Minute)
		e.mu.Lock()
		e.unnamed = true
		e.mu.Unlock()
		e.replicas["r0"].lose(true)
		e.lead("r1", 2, as("r1"))
		if got := e.follows(t); got != "r1" {
			t.Errorf("r1 leads: %s", got)
		}
	})
}

func TestNobodyIsNamed(t *testing.T) {
	together(t, 0, func(t *testing.T, e *ensemble) {
		e.mu.Lock()
		e.unnamed = true
		e.mu.Unlock()
		time.Sleep(time.Second)
		if got := e.follows(t); !strings.Contains(got, "no such host") {
			t.Errorf("no name: %s", got)
		}
		e.add("r0")
		e.lead("r0", 1, as("r0"))
		e.mu.Lock()
		e.unnamed = false
		e.mu.Unlock()
		time.Sleep(2 * time.Second)
		if got := e.follows(t); got != "r0" {
			t.Errorf("r0 leads: %s", got)
		}
	})
}

// lot is several poolmanagers over TLS that share their claims, as those of one cluster do by way of nodes.
type lot struct {
	hearthv1connect.UnimplementedAllocationServiceHandler
	mu      sync.Mutex // guards claims
	claims  map[string]string
	leading atomic.Int64  // which one leads
	asked   chan string   // if not nil, is told each id,
	hold    chan struct{} // and then this is waited for
}

type seatOf struct {
	*lot
	own int64
}

var errStandby = errors.New("this poolmanager is a standby")

func (s seatOf) Allocate(ctx context.Context, req *connect.Request[hearthv1.AllocateRequest]) (*connect.Response[hearthv1.AllocateResponse], error) {
	id := req.Msg.GetId()
	if s.asked != nil {
		s.asked <- id
		<-s.hold
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leading.Load() != s.own {
		return nil, connect.NewError(connect.CodeUnavailable, errStandby)
	}
	if s.claims[id] == "" {
		s.claims[id] = fmt.Sprintf("i-%x", sha256.Sum256([]byte(id)))
	}
	return connect.NewResponse(allocated(&hearthv1.Instance{Id: s.claims[id], Address: "127.0.0.1:1"})), nil
}

func (s seatOf) Watch(ctx context.Context, _ *connect.Request[hearthv1.WatchRequest], out *connect.ServerStream[hearthv1.WatchResponse]) error {
	if s.leading.Load() != s.own {
		return connect.NewError(connect.CodeUnavailable, errStandby)
	}
	if err := out.Send(&hearthv1.WatchResponse{Event: &hearthv1.WatchResponse_Synced{Synced: true}}); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

// newKeys gives identities by an authority of their own.
func newKeys(t *testing.T) func(identity string) *pki.Dir {
	now := time.Now()
	authorities, _, err := pki.Authorities{}.Renew(now)
	if err != nil {
		t.Fatal(err)
	}
	return func(identity string) *pki.Dir {
		b, err := authorities.Issue(now, identity)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "tls")
		if err := pki.WriteDir(path, b); err != nil {
			t.Fatal(err)
		}
		d, err := pki.OpenDir(path, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
}

func serveSeat(t *testing.T, keys *pki.Dir, s seatOf) (address string, stop func()) {
	t.Helper()
	l, err := daemon.ListenTLS(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hearthv1connect.NewAllocationServiceHandler(s))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- daemon.ServeTLS(ctx, slog.New(slog.DiscardHandler), l, keys, mux, pki.Gateway)
	}()
	return l.Addr().String(), sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func connectWith(keys *pki.Dir) func(address string) (gateway.Pool, func()) {
	return func(address string) (gateway.Pool, func()) {
		client := daemon.TLSClient(keys, pki.Poolmanager, address)
		return gateway.NewRemote(client, "http://hearth"), client.CloseIdleConnections
	}
}

// Leaders come and go, over TLS, while twenty callers ask for Instances again and again: all get theirs, and each the same when it asks again.
func TestLeaderSwitchesUnderCalls(t *testing.T) {
	keys := newKeys(t)
	ours, theirs := keys(pki.Gateway), keys(pki.Poolmanager)
	all := &lot{claims: map[string]string{}}
	all.leading.Store(-1)
	var mu sync.Mutex // guards addresses
	addresses := make([]string, 3)
	serve := func(n int) (stop func()) {
		address, stop := serveSeat(t, theirs, seatOf{lot: all, own: int64(n)})
		mu.Lock()
		defer mu.Unlock()
		addresses[n] = address
		return stop
	}
	stops := make([]func(), len(addresses))
	for n := range addresses {
		stops[n] = serve(n)
	}
	leader := gateway.NewLeader(gateway.LeaderConfig{
		Resolve: func(context.Context) ([]string, error) {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(addresses), nil
		},
		Connect: connectWith(ours),
	})
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	work.Go(func() {
		for ctx.Err() == nil {
			_ = leader.Watch(ctx, "gw", func(*hearthv1.WatchResponse) {})
		}
	})
	answered := make(chan struct{})
	for caller := range 20 {
		work.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				id := fmt.Sprintf("%d-%d", caller, n)
				first, second := askUntil(ctx, t, leader, id), askUntil(ctx, t, leader, id)
				if ctx.Err() != nil {
					return
				}
				if first == "" || first != second {
					t.Errorf("%s: %s, then %s", id, first, second)
				}
				select {
				case answered <- struct{}{}:
				case <-ctx.Done():
				}
			}
		})
	}
	for round := range 6 {
		now := int64(round % len(addresses))
		all.leading.Store(now)
		for range 100 {
			<-answered
		}
		all.leading.Store(-1)
		stops[now]() // streams end at once
		stops[now] = serve(int(now))
	}
	cancel()
	work.Wait()
	for _, stop := range stops {
		stop()
	}
	if len(all.claims) < 300 {
		t.Errorf("%d claims", len(all.claims))
	}
}

// A leader falls silent, as when its machine loses its power: nothing is refused and nothing ends. What waits for it is done by the next.
func TestSilentLeader(t *testing.T) {
	keys := newKeys(t)
	ours, theirs := keys(pki.Gateway), keys(pki.Poolmanager)
	all := &lot{claims: map[string]string{}, asked: make(chan string, 10), hold: make(chan struct{})}
	silent := make(chan struct{})
	addresses := make([]string, 2)
	for n := range addresses {
		l, stop := serveSeat(t, theirs, seatOf{lot: all, own: int64(n)})
		t.Cleanup(stop)
		addresses[n] = l
	}
	addresses[0] = between(t, addresses[0], silent)
	leader := gateway.NewLeader(gateway.LeaderConfig{
		Resolve: func(context.Context) ([]string, error) { return addresses, nil },
		Connect: connectWith(ours),
	})
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	work.Go(func() {
		for ctx.Err() == nil {
			_ = leader.Watch(ctx, "gw", func(*hearthv1.WatchResponse) {})
		}
	})
	answers := make(chan string, 1)
	work.Go(func() { answers <- askUntil(ctx, t, leader, "one") })
	<-all.asked // and the leader takes its time
	close(silent)
	all.leading.Store(1)
	if id := <-all.asked; id != "one" {
		t.Errorf("asked for %q", id)
	}
	close(all.hold)
	if <-answers == "" {
		t.Error("no answer")
	}
	cancel()
	work.Wait()
}

// between is the address of a relay that says nothing any more once silent is closed.
func between(t *testing.T, address string, silent <-chan struct{}) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	pass := func(from, to net.Conn) {
		defer context.AfterFunc(ctx, func() { _ = from.Close() })()
		buffer := make([]byte, 64<<10)
		for {
			n, err := from.Read(buffer)
			select {
			case <-silent:
				<-ctx.Done()
				_ = from.Close()
				return
			default:
			}
			if _, failed := to.Write(buffer[:n]); err != nil || failed != nil {
				_, _ = from.Close(), to.Close()
				return
			}
		}
	}
	work.Go(func() {
		for {
			theirs, err := l.Accept()
			if err != nil {
				return
			}
			ours, err := net.Dial("tcp", address)
			if err != nil {
				_ = theirs.Close()
				continue
			}
			work.Go(func() { pass(theirs, ours) })
			work.Go(func() { pass(ours, theirs) })
		}
	})
	t.Cleanup(func() {
		cancel()
		_ = l.Close()
		work.Wait()
	})
	return l.Addr().String()
}

// askUntil asks as the gateway does: again while nobody can say.
func askUntil(ctx context.Context, t *testing.T, p gateway.Pool, id string) string {
	for ctx.Err() == nil {
		res, err := p.Allocate(ctx, &hearthv1.AllocateRequest{Function: "f", Id: id})
		if err == nil {
			return res.GetInstance().GetId()
		}
		if code := connect.CodeOf(err); code != connect.CodeUnavailable && ctx.Err() == nil {
			t.Errorf("%s: %v", id, err)
			return ""
		}
	}
	return ""
}
