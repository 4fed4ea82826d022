package stack_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-serverless/hearth/internal/stack"
)

func ignore(string, int, error) {}

// A child that ends at once is started after 100 ms, 200 ms, … up to 2 s; one that was healthy begins anew.
func TestKeeperBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		began := time.Now()
		var starts []time.Duration
		start := func() (stack.FakeChild, error) {
			starts = append(starts, time.Since(began))
			c := stack.FakeChild{Ended: make(chan error, 1), Stopped: func() {}, Killed: func() {}}
			switch {
			case len(starts) == 3:
				return c, errors.New("cannot start")
			case len(starts) == 9:
				time.AfterFunc(10*time.Second, func() { c.Ended <- errors.New("after a healthy life") })
			case len(starts) == 11:
				cancel()
				c.Ended <- nil
			default:
				c.Ended <- errors.New("at once")
			}
			return c, nil
		}
		stack.Keep(ctx, start, time.Second, ignore)
		var pauses []time.Duration
		for i := 1; i < len(starts); i++ {
			pauses = append(pauses, starts[i]-starts[i-1])
		}
		ms := time.Millisecond
		want := []time.Duration{100 * ms, 200 * ms, 400 * ms, 800 * ms, 1600 * ms, 2000 * ms, 2000 * ms, 2000 * ms, 10100 * ms, 200 * ms}
		if !slices.Equal(pauses, want) {
			t.Errorf("pauses %v, want %v", pauses, want)
		}
	})
}

func TestKeeperEndsItsChild(t *testing.T) {
	for name, obeys := range map[string]bool{"politely": true, "by force": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				killed := false
				var reports []int
				start := func() (stack.FakeChild, error) {
					return stack.FakeChild{Ended: ended, Stopped: func() {
						if obeys {
							ended <- nil
						}
					}, Killed: func() { killed = true; ended <- errors.New("killed") }}, nil
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					stack.Keep(ctx, start, 3*time.Second, func(_ string, pid int, _ error) { reports = append(reports, pid) })
				}()
				synctest.Wait()
				began := time.Now()
				cancel()
				<-done
				if killed == obeys {
					t.Errorf("killed: %v", killed)
				}
				if took := time.Since(began); !obeys && took != 3*time.Second {
					t.Errorf("was killed after %s", took)
				}
				if !slices.Equal(reports, []int{7, 0}) {
					t.Errorf("reported pids %v", reports)
				}
			})
		})
	}
}
