package instance_test

import (
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

// TestRebuild gives a new engine every kind of thing that a former one may have left.
func TestRebuild(t *testing.T) {
	for name, c := range map[string]struct {
		box, ready                             bool
		container, running, launched, recorded bool
		want                                   hearthv1.State
	}{
		"waiting":                           {box: true, ready: true, container: true, running: true, want: hearthv1.State_STATE_WARM},
		"sandbox without a container":       {box: true, ready: true},
		"sandbox that has ended":            {box: true, container: true, running: true},
		"container whose launcher has died": {box: true, ready: true, container: true},
		"claimed, not yet recorded":         {box: true, ready: true, container: true, running: true, launched: true},
		"serving":                           {box: true, ready: true, container: true, running: true, launched: true, recorded: true, want: hearthv1.State_STATE_SERVING},
		"serving, process has ended":        {box: true, ready: true, container: true, launched: true, recorded: true},
		"serving, sandbox has ended":        {box: true, container: true, running: true, launched: true, recorded: true},
		"container without its sandbox":     {container: true, running: true, launched: true, recorded: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.snapshots["hearth-orphan"] = true
				if c.box {
					if _, err := f.RunSandbox(t.Context(), "a"); err != nil {
						t.Fatal(err)
					}
					box := f.sandboxes["box-1"]
					box.Ready = c.ready
					f.sandboxes["box-1"] = box
				}
				if c.container {
					labels := map[string]string{instance.LabelInstance: "a"}
					info := instance.ContainerInfo{ID: "a.fn", Labels: labels, Running: c.running}
					if c.recorded {
						maps.Copy(labels, map[string]string{
							instance.LabelClaim: "c", instance.LabelEpoch: "7",
							instance.LabelFunction: "hello", instance.LabelRevision: "hello-00001", instance.LabelPort: "8080",
						})
						info.Snapshot = "hearth-used"
					}
					f.snapshots["hearth-used"] = c.launched
					f.containers["a.fn"], f.launched["a.fn"] = info, c.launched
				}
				e, stop := runUntil(t, f)
				defer stop()
				synctest.Wait()
				got := list(t, e)["a"]
				if got.GetState() != c.want {
					t.Errorf("it is %s, want %s", got.GetState(), c.want)
				}
				if c.want == hearthv1.State_STATE_UNSPECIFIED && f.left() != nothing {
					t.Errorf("left: %s", f.left())
				}
				if f.snapshots["hearth-orphan"] {
					t.Error("a snapshot that nobody uses was left")
				}
				if c.want == hearthv1.State_STATE_SERVING {
					wantAdopted(t, e, f)
				}
			})
		})
	}
}

func wantAdopted(t *testing.T, e *instance.Engine, f *fake) {
	t.Helper()
	answer, err := activate(e, "a", "c", 7, time.Minute) // the same claim as before the restart
	if err != nil || answer.Instance.Address != "10.0.0.1:8080" || f.started != 0 {
		t.Errorf("the claim's repetition got %v, %v", answer, err)
	}
	_, err = activate(e, "a", "other", 7, time.Minute)
	wantCode(t, err, connect.CodeFailedPrecondition)
	_, err = activate(e, "a", "c", 6, time.Minute)
	wantCode(t, err, connect.CodeFailedPrecondition) // the epoch was rebuilt too
	if err := discard(e, "a", 7); err != nil || f.left() != nothing {
		t.Errorf("discard: %v; left: %s", err, f.left())
	}
}

func TestSnapshotsAreKeptPrepared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		answer, err := prepare(e, 3)
		if err != nil {
			t.Fatal(err)
		}
		if f.pulls != 1 || len(f.snapshots) != 3 || !strings.HasPrefix(answer.Image, "example.org/hello@sha256:") {
			t.Fatalf("%d pulls, %d snapshots, image %s", f.pulls, len(f.snapshots), answer.Image)
		}
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		started, err := activate(e, "a", "c", 1, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range started.Phases {
			if p.Name == "snapshot" || p.Name == "image" {
				t.Errorf("the start waited for %s", p.Name)
			}
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if len(f.snapshots) != 4 { // three and the one in use
			t.Errorf("%d snapshots after a start, want 4", len(f.snapshots))
		}
		forget(t, e, true)
		if len(f.snapshots) != 1 || len(f.images) != 1 { // the Instance still needs both
			t.Errorf("%d snapshots, %d images, want 1 and 1", len(f.snapshots), len(f.images))
		}
		if err := discard(e, "a", 1); err != nil {
			t.Fatal(err)
		}
		forget(t, e, true)
		if len(f.images) != 0 || f.left() != nothing {
			t.Errorf("%d images, left: %s", len(f.images), f.left())
		}
	})
}

func forget(t *testing.T, e *instance.Engine, image bool) {
	t.Helper()
	_, err := e.ForgetRevision(t.Context(), connect.NewRequest(&hearthv1.ForgetRevisionRequest{Revision: revision(), RemoveImage: image}))
	if err != nil {
		t.Fatal(err)
	}
}

func TestImageRemovedBehindTheEngine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		if _, err := prepare(e, 0); err != nil {
			t.Fatal(err)
		}
		f.set(func() { clear(f.images) })
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := activate(e, "a", "c", 1, time.Minute); err != nil || f.pulls != 2 {
			t.Errorf("%v after %d pulls, want 2", err, f.pulls)
		}
	})
}
