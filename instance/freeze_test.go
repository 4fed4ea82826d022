package instance_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

// frozenInstance makes one that is, called a.
func frozenInstance(t *testing.T, e *instance.Engine) *hearthv1.Instance {
	t.Helper()
	if err := create(e, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := activate(e, "a", "c1", 1, time.Minute); err != nil {
		t.Fatal(err)
	}
	p, err := freeze(e, "a", 1)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestFreezeAndThaw(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		p := frozenInstance(t, e)
		if p.State != hearthv1.State_STATE_FROZEN || p.Degree != hearthv1.Degree_DEGREE_REVISION || p.Claim != nil ||
			p.MemoryBytes != 2<<20 || p.Revision != "hello-00001" || p.Address == "" {
			t.Errorf("frozen: %v", p)
		}
		if got := f.freezer(t, "a"); got != "FROZEN" {
			t.Errorf("its freezer is %s", got)
		}
		if labels := f.labels("a"); labels[instance.LabelFrozen] == "" || labels[instance.LabelClaim] != "c1" {
			t.Errorf("recorded: %v", labels)
		}
		if again, err := freeze(e, "a", 1); err != nil || again.Version != p.Version {
			t.Errorf("freezing it again: %v, %v", again, err)
		}
		_, err := activate(e, "a", "c1", 1, time.Minute) // the claim ended with the freeze
		wantCode(t, err, connect.CodeFailedPrecondition)
	})
}

func TestThawedInstanceIsRecorded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		p := frozenInstance(t, e)
		answer, err := activate(e, "a", "c2", 3, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		i := answer.Instance
		if i.State != hearthv1.State_STATE_SERVING || i.Claim.Id != "c2" || i.Address != p.Address || i.Version <= p.Version {
			t.Errorf("thawed: %v", i)
		}
		if !hasPhase(answer, "thaw") || hasPhase(answer, "create") || f.started != 1 {
			t.Errorf("phases %v, %d starts", answer.Phases, f.started)
		}
		if got := f.freezer(t, "a"); got != "THAWED" {
			t.Errorf("its freezer is %s", got)
		}
		if f.labels("a")[instance.LabelFrozen] == "" {
			t.Error("the record was on the path")
		}
		time.Sleep(time.Second)
		labels := f.labels("a")
		if labels[instance.LabelFrozen] != "" || labels[instance.LabelClaim] != "c2" || labels[instance.LabelEpoch] != "3" {
			t.Errorf("recorded: %v", labels)
		}
		if p, err = freeze(e, "a", 3); err != nil || p.State != hearthv1.State_STATE_FROZEN {
			t.Errorf("the second freeze: %v, %v", p, err)
		}
	})
}

func TestFreezeIsRefused(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	_, err := freeze(e, "a", 1)
	wantCode(t, err, connect.CodeNotFound)
	_, err = freeze(e, "../a", 1)
	wantCode(t, err, connect.CodeInvalidArgument)
	_, err = freeze(e, "a", -1)
	wantCode(t, err, connect.CodeInvalidArgument)
	if err := create(e, "a"); err != nil {
		t.Fatal(err)
	}
	_, err = freeze(e, "a", 1) // it is warm
	wantCode(t, err, connect.CodeFailedPrecondition)
	if _, err := activate(e, "a", "c1", 5, time.Minute); err != nil {
		t.Fatal(err)
	}
	_, err = freeze(e, "a", 4)
	wantCode(t, err, connect.CodeFailedPrecondition)
	if _, err := freeze(e, "a", 0); err != nil { // a human's
		t.Error(err)
	}
	_, err = activate(e, "a", "c2", 4, time.Minute)
	wantCode(t, err, connect.CodeFailedPrecondition)
}

// TestFrozenIsItsRevisionsOnly claims a frozen Instance for others.
func TestFrozenIsItsRevisionsOnly(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	frozenInstance(t, e)
	for _, r := range []*hearthv1.Revision{
		{Name: "hello-00002", Function: "hello", Image: "example.org/hello:1", Port: 8080},
		{Name: "hello-00001", Function: "other", Image: "example.org/hello:1", Port: 8080},
	} {
		_, err := e.Activate(t.Context(), connect.NewRequest(&hearthv1.ActivateRequest{
			InstanceId: "a", Revision: r, Claim: &hearthv1.Claim{Id: "c2", Epoch: 1},
		}))
		wantCode(t, err, connect.CodeFailedPrecondition)
	}
	if got := f.freezer(t, "a"); got != "FROZEN" {
		t.Errorf("its freezer is %s", got)
	}
}

// TestOneOfManyClaimsThaws has a hundred claims want a frozen Instance.
func TestOneOfManyClaimsThaws(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	frozenInstance(t, e)
	var won atomic.Int32
	var all sync.WaitGroup
	for n := range 100 {
		all.Go(func() {
			if _, err := activate(e, "a", fmt.Sprint("claim-", n), 1, time.Minute); err == nil {
				won.Add(1)
			} else {
				wantCode(t, err, connect.CodeFailedPrecondition)
			}
		})
	}
	all.Wait()
	if won.Load() != 1 {
		t.Errorf("%d claims won", won.Load())
	}
}

// TestFreezeWithoutContainerd: what cannot be recorded is not frozen, and serves on.
func TestFreezeWithoutContainerd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := activate(e, "a", "c1", 1, time.Minute); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // it is recorded
		f.set(func() { f.down = true })
		_, err := freeze(e, "a", 1)
		wantCode(t, err, connect.CodeUnavailable)
		if got := f.freezer(t, "a"); got != "THAWED" {
			t.Errorf("its freezer is %s", got)
		}
		f.set(func() { f.down = false })
		time.Sleep(10 * time.Second)
		if got := list(t, e)["a"].GetState(); got != hearthv1.State_STATE_SERVING {
			t.Errorf("it is %s", got)
		}
		if _, err := freeze(e, "a", 1); err != nil {
			t.Error(err)
		}
	})
}

// TestAnswerOfTheNoteIsLost: the note came to be and its answer did not; the engine takes it back.
func TestAnswerOfTheNoteIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := activate(e, "a", "c1", 1, time.Minute); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		lost := false
		f.onLabel = func(context.Context) error {
			if lost {
				return nil
			}
			lost = true
			f.set(func() { f.containers["a.fn"].Labels[instance.LabelFrozen] = "2026-01-01T00:00:00Z" })
			return errors.New("lost")
		}
		_, err := freeze(e, "a", 1)
		wantCode(t, err, connect.CodeUnavailable)
		time.Sleep(time.Second)
		if got := f.labels("a")[instance.LabelFrozen]; got != "" {
			t.Errorf("it is still noted as frozen since %s", got)
		}
	})
}

// TestDoesNotFreeze: the kernel cannot stop it.
func TestDoesNotFreeze(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := activate(e, "a", "c1", 1, time.Minute); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(f.cgroupFile("a", "freezer", "freezer.state")); err != nil {
			t.Fatal(err)
		}
		_, err := freeze(e, "a", 1)
		wantCode(t, err, connect.CodeInternal)
		synctest.Wait()
		if got := f.left(); got != nothing || len(list(t, e)) != 0 {
			t.Errorf("left: %s", got)
		}
	})
}

// TestFrozenIsDiscarded: whatever ends a frozen Instance thaws it first, or it could not end; the fake sees to that.
func TestFrozenIsDiscarded(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, f *fake, e *instance.Engine){
		"discard": func(t *testing.T, _ *fake, e *instance.Engine) {
			if err := discard(e, "a", 1); err != nil {
				t.Error(err)
			}
		},
		"its process ends": func(_ *testing.T, f *fake, _ *instance.Engine) {
			f.exits <- instance.Exit{Container: "a.fn", Status: 137}
		},
		"the kernel says that its process has ended": func(_ *testing.T, f *fake, _ *instance.Engine) { f.crash <- struct{}{} },
		"its sandbox ends":                           func(_ *testing.T, f *fake, _ *instance.Engine) { f.exits <- instance.Exit{Container: "box-1"} },
		"an end that nobody told": func(_ *testing.T, f *fake, _ *instance.Engine) {
			f.set(func() {
				c := f.containers["a.fn"]
				c.Running, c.Ended = false, true
				f.containers["a.fn"] = c
			})
		},
		"somebody sends SIGTERM": func(t *testing.T, f *fake, _ *instance.Engine) {
			path := filepath.Join(f.host, "proc", "1", "status")
			text := "Name:\tx\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000004000\nSigBlk:\t0\n"
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
				t.Fatal(err)
			}
		},
		"somebody thaws it": func(t *testing.T, f *fake, _ *instance.Engine) {
			if err := os.WriteFile(f.cgroupFile("a", "freezer", "freezer.state"), []byte("THAWED"), 0o644); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				e, stop := runUntil(t, f)
				defer stop()
				frozenInstance(t, e)
				end(t, f, e)
				time.Sleep(time.Minute) // of the bubble's time
				synctest.Wait()
				if got := f.left(); got != nothing || len(list(t, e)) != 0 {
					t.Errorf("left: %s", got)
				}
			})
		})
	}
}

// TestProcessThatEndedWhileFrozen is told of together with the claim.
func TestProcessThatEndedWhileFrozen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		frozenInstance(t, e)
		go func() { f.exits <- instance.Exit{Container: "a.fn", Status: 137} }()
		_, err := activate(e, "a", "c2", 1, time.Minute)
		time.Sleep(time.Second)
		synctest.Wait()
		if _, ok := list(t, e)["a"]; ok {
			t.Errorf("it is still there; the claim got %v", err)
		}
		if got := f.left(); got != nothing {
			t.Errorf("left: %s", got)
		}
	})
}

// TestRebuildFrozen gives a new engine what a former one that was killed may have left of a frozen Instance.
func TestRebuildFrozen(t *testing.T) {
	for name, c := range map[string]struct {
		recorded, noted bool
		freezer         string
		want            hearthv1.State
	}{
		"frozen":                            {recorded: true, noted: true, freezer: "FROZEN", want: hearthv1.State_STATE_FROZEN},
		"killed before it was noted":        {recorded: true, freezer: "FROZEN", want: hearthv1.State_STATE_FROZEN},
		"killed after it was noted":         {recorded: true, noted: true, freezer: "THAWED"},
		"thawed by a claim, not yet record": {recorded: true, noted: true, freezer: "THAWED"},
		"still coming to a stop":            {recorded: true, noted: true, freezer: "FREEZING", want: hearthv1.State_STATE_FROZEN},
		"a frozen launcher":                 {freezer: "FROZEN"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				if _, err := f.RunSandbox(t.Context(), "a"); err != nil {
					t.Fatal(err)
				}
				labels := map[string]string{instance.LabelInstance: "a"}
				if c.recorded {
					labels[instance.LabelClaim], labels[instance.LabelEpoch] = "c", "7"
					labels[instance.LabelFunction], labels[instance.LabelRevision] = "hello", "hello-00001"
					labels[instance.LabelPort], labels[instance.LabelVersion] = "8080", "99"
				}
				since := time.Now().Add(-time.Hour).Format(time.RFC3339Nano)
				if c.noted {
					labels[instance.LabelFrozen] = since
				}
				f.containers["a.fn"] = instance.ContainerInfo{ID: "a.fn", Labels: labels, Running: true, Snapshot: "hearth-used"}
				f.snapshots["hearth-used"], f.launched["a.fn"] = true, c.recorded
				if err := f.makeCgroup("a", c.freezer); err != nil {
					t.Fatal(err)
				}
				e, stop := runUntil(t, f)
				defer stop()
				synctest.Wait()
				if got := list(t, e)["a"].GetState(); got != c.want {
					t.Fatalf("it is %s, want %s", got, c.want)
				}
				if c.want == hearthv1.State_STATE_UNSPECIFIED {
					if f.left() != nothing {
						t.Errorf("left: %s", f.left())
					}
					return
				}
				wantFrozenAdopted(t, e, f)
			})
		})
	}
}

func wantFrozenAdopted(t *testing.T, e *instance.Engine, f *fake) {
	t.Helper()
	if f.labels("a")[instance.LabelFrozen] == "" || f.freezer(t, "a") != "FROZEN" {
		t.Errorf("labels %v, freezer %s", f.labels("a"), f.freezer(t, "a"))
	}
	p := list(t, e)["a"]
	if p.Claim != nil || p.MemoryBytes != 2<<20 || p.Version <= 99 {
		t.Errorf("adopted: %v", p)
	}
	_, err := activate(e, "a", "d", 6, time.Minute)
	wantCode(t, err, connect.CodeFailedPrecondition) // the epoch was rebuilt too
	answer, err := activate(e, "a", "d", 7, time.Minute)
	if err != nil || answer.Instance.Address != "10.0.0.1:8080" || f.started != 0 {
		t.Errorf("the claim got %v, %v", answer, err)
	}
	if err := discard(e, "a", 7); err != nil || f.left() != nothing {
		t.Errorf("discard: %v; left: %s", err, f.left())
	}
}

// TestVersionsOutliveAClockThatWasSetBack: what is recorded is of the future.
func TestVersionsOutliveAClockThatWasSetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		if _, err := f.RunSandbox(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		future := time.Now().Add(time.Hour).UnixNano()
		f.containers["a.fn"] = instance.ContainerInfo{ID: "a.fn", Running: true, Snapshot: "hearth-used", Labels: map[string]string{
			instance.LabelInstance: "a", instance.LabelClaim: "c", instance.LabelEpoch: "7", instance.LabelFunction: "hello",
			instance.LabelRevision: "hello-00001", instance.LabelPort: "8080", instance.LabelVersion: fmt.Sprint(future),
		}}
		e, stop := runUntil(t, f)
		defer stop()
		synctest.Wait()
		if got := list(t, e)["a"].GetVersion(); got <= future {
			t.Errorf("its version is %d, before the restart it was %d", got, future)
		}
	})
}
