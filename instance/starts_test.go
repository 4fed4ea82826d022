package instance_test

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

// TestRecordsWaitForALull: while others start, what an Instance has become is not recorded, but not for long.
func TestRecordsWaitForALull(t *testing.T) {
	for others, latest := range map[time.Duration]time.Duration{
		0:                      50 * time.Millisecond,
		500 * time.Millisecond: 550 * time.Millisecond,
		time.Minute:            1050 * time.Millisecond,
	} {
		t.Run(others.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				e, stop := runUntil(t, f)
				defer stop()
				makeMany(t, e, 2)
				f.onLaunch = func(context.Context) error { time.Sleep(others); return nil }
				var other sync.WaitGroup
				other.Go(func() {
					if _, err := activate(e, name(1), "c-other", 1, 2*time.Minute); err != nil {
						t.Error(err)
					}
				})
				synctest.Wait()
				f.onLaunch = nil
				if _, err := activate(e, name(0), "c", 1, time.Minute); err != nil {
					t.Error(err)
				}
				begin := time.Now()
				for f.labels(name(0))[instance.LabelClaim] == "" && time.Since(begin) < time.Hour {
					time.Sleep(time.Millisecond)
				}
				if took := time.Since(begin); took < latest-50*time.Millisecond || took > latest {
					t.Errorf("it was recorded after %s, want %s", took, latest)
				}
				other.Wait()
			})
		})
	}
}

// An engine that ends at once after a start has recorded it: the next one would end an Instance of which nobody knows.
func TestEndRecordsWhatServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		makeMany(t, e, 1)
		if _, err := activate(e, name(0), "c", 1, time.Minute); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		stop()
		if got := f.labels(name(0))[instance.LabelClaim]; got != "c" {
			t.Errorf("the claim %q is recorded", got)
		}
	})
}

func name(n int) string { return fmt.Sprintf("i-%d", n) }

func makeMany(t *testing.T, e *instance.Engine, n int) {
	t.Helper()
	for i := range n {
		if err := create(e, name(i)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPreparedIsStartedByDigest: what a Revision was prepared as is at hand by the name that its starts have for it.
func TestPreparedIsStartedByDigest(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	prepared, err := prepare(e, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := create(e, "a"); err != nil {
		t.Fatal(err)
	}
	r := revision()
	if r.Image = prepared.Image; r.Image == revision().Image {
		t.Fatalf("the image is named %s, with no digest", r.Image)
	}
	answer, err := e.Activate(t.Context(), connect.NewRequest(&hearthv1.ActivateRequest{
		InstanceId: "a", Revision: r, Claim: &hearthv1.Claim{Id: "c", Epoch: 1},
	}))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range answer.Msg.Phases {
		if p.Name == "image" || p.Name == "snapshot" {
			t.Errorf("the start waited for its %s", p.Name)
		}
	}
}

// TestStartsTakeTurns: of many starts at once a few go on at a time, but none waits for one that hangs.
func TestStartsTakeTurns(t *testing.T) {
	turns := runtime.NumCPU() + 1
	for took, want := range map[time.Duration]struct {
		most int
		last time.Duration
	}{
		10 * time.Millisecond: {most: turns, last: 30 * time.Millisecond},
		time.Minute:           {most: 3 * turns, last: time.Minute + 200*time.Millisecond},
	} {
		t.Run(took.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				e, stop := runUntil(t, f)
				defer stop()
				makeMany(t, e, 3*turns)
				var now, most atomic.Int64
				f.onLaunch = func(context.Context) error {
					for n := now.Add(1); ; {
						if seen := most.Load(); seen >= n || most.CompareAndSwap(seen, n) {
							break
						}
					}
					time.Sleep(took)
					now.Add(-1)
					return nil
				}
				begin := time.Now()
				var all sync.WaitGroup
				for n := range 3 * turns {
					all.Go(func() {
						if _, err := activate(e, name(n), fmt.Sprintf("c-%d", n), 1, 5*time.Minute); err != nil {
							t.Error(err)
						}
					})
				}
				all.Wait()
				if got := int(most.Load()); got != want.most {
					t.Errorf("%d starts at once, want %d", got, want.most)
				}
				if got := time.Since(begin).Truncate(10 * time.Millisecond); got != want.last {
					t.Errorf("the last after %v, want %v", got, want.last)
				}
			})
		})
	}
}
