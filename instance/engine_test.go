package instance_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

func TestOneOfManyClaimsWins(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	if err := create(e, "a"); err != nil {
		t.Fatal(err)
	}
	var won atomic.Int32
	var all sync.WaitGroup
	for n := range 100 {
		all.Go(func() {
			answer, err := activate(e, "a", fmt.Sprint("claim-", n), 1, time.Minute)
			if err == nil {
				won.Add(1)
				if answer.Instance.Claim.Id != fmt.Sprint("claim-", n) {
					t.Errorf("claim-%d got the answer of %s", n, answer.Instance.Claim.Id)
				}
				return
			}
			wantCode(t, err, connect.CodeFailedPrecondition)
		})
	}
	all.Wait()
	if won.Load() != 1 || f.started != 1 {
		t.Errorf("%d claims won, %d containers were created, want 1", won.Load(), f.started)
	}
}

func TestSameClaimIsOneActivation(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	if err := create(e, "a"); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			answer, err := activate(e, "a", "claim", 1, time.Minute)
			if err != nil || answer.Instance.State != hearthv1.State_STATE_SERVING || answer.Instance.Address == "" {
				t.Errorf("got %v, %v", answer, err)
			}
		})
	}
	all.Wait()
	if f.started != 1 {
		t.Errorf("%d containers were created, want 1", f.started)
	}
}

func TestEpochs(t *testing.T) {
	e := run(t, newFake(t))
	for _, id := range []string{"a", "b"} {
		if err := create(e, id); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := activate(e, "a", "c1", 5, time.Minute); err != nil {
		t.Fatal(err)
	}
	_, err := activate(e, "b", "c2", 4, time.Minute)
	wantCode(t, err, connect.CodeFailedPrecondition)
	wantCode(t, discard(e, "a", 4), connect.CodeFailedPrecondition)
	if err := discard(e, "a", 0); err != nil { // a human's
		t.Error(err)
	}
	if _, err := activate(e, "b", "c2", 6, time.Minute); err != nil {
		t.Error(err)
	}
	// A term is the last from when it listens, and one that is over may listen, to learn so.
	for _, epoch := range []int64{8, 7} {
		heard := errors.New("heard")
		err := e.WatchIn(t.Context(), epoch, func(r *hearthv1.WatchInstancesResponse) error {
			if r.GetEpoch() != 8 {
				t.Errorf("term %d is told of term %d, not of 8", epoch, r.GetEpoch())
			}
			return heard
		})
		if !errors.Is(err, heard) {
			t.Error(err)
		}
	}
	wantCode(t, discard(e, "b", 7), connect.CodeFailedPrecondition)
	wantCode(t, e.WatchIn(t.Context(), -1, nil), connect.CodeInvalidArgument)
}

func TestClaimThatDoesNotServeByItsDeadlineIsDiscarded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.listens = false
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		_, err := activate(e, "a", "c", 1, 10*time.Second)
		wantCode(t, err, connect.CodeDeadlineExceeded)
		if took := time.Since(begin); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("it took %s", took)
		}
		synctest.Wait()
		if got := f.left(); got != nothing || len(list(t, e)) != 0 {
			t.Errorf("left: %s", got)
		}
	})
}

func TestClaimWhoseCallerHasGoneIsFinished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		release := make(chan struct{})
		f.onLaunch = func(context.Context) error { <-release; return nil }
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		answered := make(chan error)
		go func() {
			_, err := e.Activate(ctx, connect.NewRequest(&hearthv1.ActivateRequest{
				InstanceId: "a", Revision: revision(), Claim: &hearthv1.Claim{Id: "c", Epoch: 1},
			}))
			answered <- err
		}()
		synctest.Wait()
		cancel()
		wantCode(t, <-answered, connect.CodeCanceled)
		close(release)
		time.Sleep(time.Second)
		synctest.Wait()
		if got := list(t, e)["a"].GetState(); got != hearthv1.State_STATE_SERVING {
			t.Errorf("it is %s", got)
		}
	})
}

func TestProcessThatEndsBeforeItListens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.listens = false
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		answered := make(chan error)
		go func() {
			_, err := activate(e, "a", "c", 1, time.Minute)
			answered <- err
		}()
		synctest.Wait()
		f.exits <- instance.Exit{Container: "a.fn", Status: 3}
		err := <-answered
		wantCode(t, err, connect.CodeInternal)
		if !strings.Contains(err.Error(), "status 3") {
			t.Errorf("%v does not tell the status", err)
		}
		synctest.Wait()
		if got := f.left(); got != nothing {
			t.Errorf("left: %s", got)
		}
	})
}

// TestCrashWhileContainerdIsAway: the kernel tells of it, and what is left is removed when containerd is back.
func TestCrashWhileContainerdIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := activate(e, "a", "c", 1, time.Minute); err != nil {
			t.Fatal(err)
		}
		f.set(func() { f.down = true })
		begin := time.Now()
		f.crash <- struct{}{}
		for len(list(t, e)) > 0 {
			time.Sleep(time.Millisecond)
		}
		if took := time.Since(begin); took > 100*time.Millisecond { // of the bubble's time
			t.Errorf("it took %s", took)
		}
		f.set(func() { f.down = false })
		time.Sleep(time.Minute)
		if got := f.left(); got != nothing {
			t.Errorf("left: %s", got)
		}
	})
}

// TestCrashIsToldWithItsStatus: the kernel is faster than containerd, which has the status that the caller wants to know.
func TestCrashIsToldWithItsStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.listens = false
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		answered := make(chan error)
		go func() {
			_, err := activate(e, "a", "c", 1, time.Minute)
			answered <- err
		}()
		synctest.Wait()
		f.crash <- struct{}{}
		time.Sleep(time.Second)
		f.exits <- instance.Exit{Container: "a.fn", Status: 3}
		if err := <-answered; err == nil || !strings.Contains(err.Error(), "status 3") {
			t.Errorf("%v does not tell the status", err)
		}
	})
}

func TestEndsThatNobodyAskedFor(t *testing.T) {
	for name, x := range map[string]string{"process": "a.fn", "sandbox": "box-1"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				e, stop := runUntil(t, f)
				defer stop()
				if err := create(e, "a"); err != nil {
					t.Fatal(err)
				}
				if _, err := activate(e, "a", "c", 1, time.Minute); err != nil {
					t.Fatal(err)
				}
				f.exits <- instance.Exit{Container: x, Status: 1}
				synctest.Wait()
				if got := f.left(); got != nothing || len(list(t, e)) != 0 {
					t.Errorf("left: %s", got)
				}
			})
		})
	}
}

func TestEndThatNobodyTold(t *testing.T) {
	for name, harm := range map[string]func(f *fake){
		"process": func(f *fake) {
			c := f.containers["a.fn"]
			c.Running, c.Ended = false, true
			f.containers["a.fn"] = c
		},
		"container": func(f *fake) { delete(f.containers, "a.fn") },
		"sandbox":   func(f *fake) { clear(f.sandboxes) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				e, stop := runUntil(t, f)
				defer stop()
				if err := create(e, "a"); err != nil {
					t.Fatal(err)
				}
				if _, err := activate(e, "a", "c", 1, time.Minute); err != nil {
					t.Fatal(err)
				}
				f.set(func() { harm(f) })
				time.Sleep(time.Minute) // of the bubble's time: a comparison or two
				synctest.Wait()
				if got := f.left(); got != nothing || len(list(t, e)) != 0 {
					t.Errorf("left: %s", got)
				}
			})
		})
	}
}

// follows are the states that may follow one.
var follows = map[hearthv1.State]string{
	hearthv1.State_STATE_UNSPECIFIED: "CREATING DRAINING", // of what nobody knew
	hearthv1.State_STATE_CREATING:    "WARM DRAINING GONE",
	hearthv1.State_STATE_WARM:        "CLAIMED DRAINING GONE",
	hearthv1.State_STATE_CLAIMED:     "SERVING DRAINING GONE",
	hearthv1.State_STATE_SERVING:     "FROZEN DRAINING GONE",
	hearthv1.State_STATE_FROZEN:      "CLAIMED DRAINING GONE",
	hearthv1.State_STATE_DRAINING:    "GONE",
}

// wantMoves listens until ctx is done, and fails at a move that may not be, or a version that is not newer.
func wantMoves(ctx context.Context, e *instance.Engine, listening chan<- struct{}) error {
	last := map[string]*hearthv1.Instance{}
	return e.Watch(ctx, func(r *hearthv1.WatchInstancesResponse) error {
		i := r.GetInstance()
		if i == nil {
			close(listening)
			return nil
		}
		before := last[i.Id]
		if !slices.Contains(strings.Fields(follows[before.GetState()]), strings.TrimPrefix(i.State.String(), "STATE_")) {
			return fmt.Errorf("%s went from %s to %s", i.Id, before.GetState(), i.State)
		}
		if i.Version <= before.GetVersion() {
			return fmt.Errorf("%s went from version %d to %d", i.Id, before.GetVersion(), i.Version)
		}
		if claimed := i.State == hearthv1.State_STATE_CLAIMED || i.State == hearthv1.State_STATE_SERVING; claimed && i.Claim == nil {
			return fmt.Errorf("%s is %s without a claim", i.Id, i.State)
		}
		if last[i.Id] = i; i.State == hearthv1.State_STATE_GONE {
			last[i.Id] = &hearthv1.Instance{Version: i.Version}
		}
		return nil
	})
}

// TestMoves does everything to a few Instances at once, in random order, and listens.
func TestMoves(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	watched, listening := make(chan error, 1), make(chan struct{})
	go func() { watched <- wantMoves(ctx, e, listening) }()
	<-listening
	var frozen, thawed atomic.Int32
	var all sync.WaitGroup
	for worker := range 8 {
		random := rand.New(rand.NewPCG(1, uint64(worker)))
		all.Go(func() {
			for n := range 150 {
				id := fmt.Sprint("i-", random.IntN(4))
				switch random.IntN(12) {
				case 0, 1:
					_ = create(e, id)
				case 2, 3, 4, 5:
					_, _ = activate(e, id, fmt.Sprintf("c-%d-%d", worker, n), 1, time.Minute)
				case 6, 7, 8, 9:
					if _, err := freeze(e, id, 1); err != nil {
						continue
					}
					frozen.Add(1)
					if _, err := activate(e, id, fmt.Sprintf("d-%d-%d", worker, n), 1, time.Minute); err == nil {
						thawed.Add(1)
					}
				case 10:
					if err := discard(e, id, 1); err != nil {
						t.Error(err)
					}
				case 11:
					f.set(func() {
						if c, ok := f.containers[id+".fn"]; ok {
							c.Running, c.Ended = false, true
							f.containers[id+".fn"] = c
						}
					})
					if err := e.Reconcile(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	all.Wait()
	for n := range 4 { // also those that have gone by themselves: it returns when nothing of them is left
		if err := discard(e, fmt.Sprint("i-", n), 1); err != nil {
			t.Error(err)
		}
	}
	cancel()
	if err := <-watched; err != nil {
		t.Error(err)
	}
	if got := f.left(); got != nothing {
		t.Errorf("left: %s", got)
	}
	t.Logf("%d frozen, %d thawed", frozen.Load(), thawed.Load())
}

func hasPhase(answer *hearthv1.ActivateResponse, name string) bool {
	return slices.ContainsFunc(answer.Phases, func(p *hearthv1.Phase) bool { return p.Name == name })
}

func TestDiscardWhileCreating(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.onLaunch = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		answered := make(chan error)
		go func() {
			_, err := activate(e, "a", "c", 1, time.Minute)
			answered <- err
		}()
		synctest.Wait()
		if err := discard(e, "a", 1); err != nil {
			t.Error(err)
		}
		wantCode(t, <-answered, connect.CodeUnavailable)
		if got := f.left(); got != nothing {
			t.Errorf("left: %s", got)
		}
	})
}

func TestContainerdAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.down = true
		e, stop := runUntil(t, f)
		defer stop()
		wantCode(t, create(e, "a"), connect.CodeUnavailable)
		f.set(func() { f.down = false })
		time.Sleep(time.Second)
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		f.set(func() { f.down = true })
		wantCode(t, create(e, "b"), connect.CodeUnavailable)
		_, err := activate(e, "a", "c", 1, time.Minute)
		wantCode(t, err, connect.CodeUnavailable)
		f.set(func() { f.down = false })
		time.Sleep(time.Minute)
		if got := f.left(); got != nothing { // both failed and had to go, as soon as that was possible
			t.Errorf("left: %s", got)
		}
	})
}

func TestSlowSubscriberIsLetGo(t *testing.T) {
	e := run(t, newFake(t))
	listening, more := make(chan struct{}), make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		ended <- e.Watch(t.Context(), func(r *hearthv1.WatchInstancesResponse) error {
			if r.GetSynced() {
				close(listening)
				<-more
			}
			return nil
		})
	}()
	<-listening
	for n := range 300 { // four changes each
		id := fmt.Sprint("i-", n)
		if err := errors.Join(create(e, id), discard(e, id, 0)); err != nil {
			t.Fatal(err)
		}
	}
	close(more)
	wantCode(t, <-ended, connect.CodeResourceExhausted)
}
