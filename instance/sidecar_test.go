package instance_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
	"github.com/hearth-serverless/hearth/sidecar/control"
)

// fakeSidecar is one of fake's; it outlives the engines that know it.
type fakeSidecar struct {
	mu       sync.Mutex
	serve    *control.Serve
	serving  bool
	inFlight time.Duration // that a drain takes
	refuses  error
	dead     bool
	hangs    bool
	tellings int    // of serve
	onServe  func() // likewise
	onDrain  func()
	links    []*fakeLink
}

// fakeLink is one engine's connection to it.
type fakeLink struct {
	*fakeSidecar
	status control.Status
	events chan control.Event
	ended  chan error
	once   sync.Once
}

func (s *fakeSidecar) connect() (instance.Sidecar, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return nil, errdefs.ErrNotFound
	}
	l := &fakeLink{fakeSidecar: s, events: make(chan control.Event, 10), ended: make(chan error, 1)}
	if s.serve != nil {
		l.status = control.Status{Function: s.serve.Function, Serving: s.serving}
	}
	s.links = append(s.links, l)
	return l, nil
}

// die ends it and all connections.
func (s *fakeSidecar) die() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = true
	for _, l := range s.links {
		l.once.Do(func() { l.ended <- control.ErrClosed })
	}
}

// told tells whether it was told what to serve.
func (s *fakeSidecar) told() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serve != nil
}

func (s *fakeSidecar) tell(e control.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.links[len(s.links)-1].events <- e
}

func (l *fakeLink) Status() control.Status { return l.status }

func (l *fakeLink) Serve(_ context.Context, s control.Serve) (control.Serving, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.onServe != nil {
		l.onServe()
	}
	l.serve, l.serving = &s, true
	l.tellings++
	return control.Serving{Listen: s.Listen, Probe: s.Probe}, l.refuses
}

func (l *fakeLink) Drain(ctx context.Context) error {
	l.mu.Lock()
	l.serving = false
	takes := l.inFlight
	if l.onDrain != nil {
		l.onDrain()
	}
	l.mu.Unlock()
	select {
	case <-time.After(takes):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *fakeLink) Follow(tell func(control.Event, string)) error {
	for {
		select {
		case e := <-l.events:
			tell(e, "reason")
		case err := <-l.ended:
			return err
		}
	}
}

func (l *fakeLink) Close() error {
	l.once.Do(func() { l.ended <- nil })
	return nil
}

func (f *fake) CreateSidecar(_ context.Context, c instance.Container) (instance.Sidecar, error) {
	s := &fakeSidecar{}
	limit := f.sidecarLimit(strings.TrimSuffix(c.ID, ".sidecar"))
	err := f.locked(func() error {
		f.sidecars[c.ID] = s
		return errors.Join(os.MkdirAll(filepath.Dir(limit), 0o755), os.WriteFile(limit, nil, 0o644))
	})
	if err != nil {
		return nil, err
	}
	return s.connect()
}

// sidecarLimit is the file with its memory limit.
func (f *fake) sidecarLimit(id string) string {
	return filepath.Join(f.host, "cgroup/memory/hearth-fake/pod-"+id, "sidecar/memory.limit_in_bytes")
}

func (f *fake) FindSidecar(ctx context.Context, c instance.Container) (instance.Sidecar, error) {
	var s *fakeSidecar
	if err := f.locked(func() error { s = f.sidecars[c.ID]; return nil }); err != nil {
		return nil, err
	}
	if s == nil {
		return nil, errdefs.ErrNotFound
	}
	if s.hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return s.connect()
}

// chowned skips a test that cannot give a directory to another user.
func chowned(t *testing.T) {
	t.Helper()
	if err := os.Chown(t.TempDir(), 65532, 65532); err != nil {
		t.Skipf("it takes root: %v", err)
	}
}

func newSidecarFake(t *testing.T) *fake {
	t.Helper()
	chowned(t)
	f := newFake(t)
	f.config.Sidecar = "/sidecar"
	return f
}

// serveIn activates an Instance.
func serveIn(e *instance.Engine, id, claim string) (*hearthv1.ActivateResponse, error) {
	r := revision()
	r.Concurrency = 10
	answer, err := e.Activate(context.Background(), connect.NewRequest(&hearthv1.ActivateRequest{
		InstanceId: id, Revision: r, Claim: &hearthv1.Claim{Id: claim, Epoch: 1},
	}))
	if err != nil {
		return nil, err
	}
	return answer.Msg, nil
}

// Requests come to the sidecar, which is told before the Function is there and drained before that ends.
func TestSidecarServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newSidecarFake(t)
		e := run(t, f)
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		s := f.sidecars["a.sidecar"]
		f.onLaunch = func(context.Context) error {
			if s.serve == nil {
				t.Error("the function is launched before its sidecar serves")
			}
			return nil
		}
		f.set(func() { f.listens = false }) // outside of loopback
		go func() {
			time.Sleep(time.Second)
			s.tell(control.Ready)
		}()
		answer, err := serveIn(e, "a", "c")
		if err != nil || answer.Instance.Address != "10.0.0.1:8012" {
			t.Fatalf("%v, %v", answer, err)
		}
		if q := s.serve; q.Function != "hello-00001" || q.Targets[0].String() != "127.0.0.1:8080" || q.Probe.String() != "10.0.0.1:8013" || q.Concurrency != 10 {
			t.Errorf("told %+v", q)
		}
		s.inFlight = 3 * time.Second
		begin := time.Now()
		_, err = e.Discard(t.Context(), connect.NewRequest(&hearthv1.DiscardRequest{InstanceId: "a", Epoch: 1, Grace: durationpb.New(10 * time.Second)}))
		if err != nil || time.Since(begin) != s.inFlight || s.serving {
			t.Errorf("discard: %v after %s", err, time.Since(begin))
		}
		if f.left() != nothing || len(f.sidecars) > 0 {
			t.Errorf("left: %s, %d sidecars", f.left(), len(f.sidecars))
		}
	})
}

// An Instance ends with its sidecar, in whatever state, and when its Function refuses connections.
func TestSidecarEnds(t *testing.T) {
	for name, c := range map[string]struct {
		serving bool
		end     func(*fakeSidecar)
	}{
		"warm":    {false, (*fakeSidecar).die},
		"serving": {true, (*fakeSidecar).die},
		"refused": {true, func(s *fakeSidecar) { s.tell(control.Refused) }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newSidecarFake(t)
				e := run(t, f)
				if err := create(e, "a"); err != nil {
					t.Fatal(err)
				}
				if c.serving {
					if _, err := serveIn(e, "a", "c"); err != nil {
						t.Fatal(err)
					}
				}
				c.end(f.sidecars["a.sidecar"])
				time.Sleep(time.Second)
				synctest.Wait()
				if got := list(t, e); len(got) > 0 || f.left() != nothing || len(f.sidecars) > 0 {
					t.Errorf("%v; left: %s, %d sidecars", got, f.left(), len(f.sidecars))
				}
			})
		})
	}
}

// A sidecar that cannot serve is a start that failed.
func TestSidecarCannotServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newSidecarFake(t)
		e := run(t, f)
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		f.sidecars["a.sidecar"].refuses = errors.New("address in use")
		_, err := serveIn(e, "a", "c")
		wantCode(t, err, connect.CodeInternal)
		time.Sleep(time.Second)
		synctest.Wait()
		if f.started > 0 || f.left() != nothing || len(f.sidecars) > 0 {
			t.Errorf("%d started; left: %s, %d sidecars", f.started, f.left(), len(f.sidecars))
		}
	})
}

// A new engine takes over sidecars that serve what the Instance serves, and discards Instances with any other.
func TestSidecarAdopted(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*fakeSidecar)
		want   int // Instances
	}{
		"as it was":        {func(*fakeSidecar) {}, 2},
		"has died":         {func(s *fakeSidecar) { s.die() }, 1},
		"another function": {func(s *fakeSidecar) { s.serve.Function = "other-00001" }, 1},
		"drained":          {func(s *fakeSidecar) { s.serving = false }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newSidecarFake(t)
				root := t.TempDir()
				e, stop := runIn(t, f, root)
				for _, id := range []string{"warm", "serving"} {
					if err := create(e, id); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := serveIn(e, "serving", "c"); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second) // recorded
				synctest.Wait()
				stop()
				f.config.Sidecar = "" // Instances keep what they were made with
				c.change(f.sidecars["serving.sidecar"])
				e, stop = runIn(t, f, root)
				t.Cleanup(stop)
				synctest.Wait()
				got := list(t, e)
				if len(got) != c.want || got["warm"].GetState() != hearthv1.State_STATE_WARM {
					t.Fatalf("%v", got)
				}
				if c.want == 2 && got["serving"].GetAddress() != "10.0.0.2:8012" {
					t.Errorf("%v", got["serving"])
				}
				f.sidecars["warm.sidecar"].die() // it is followed again
				time.Sleep(time.Second)
				synctest.Wait()
				if got := list(t, e); len(got) != c.want-1 {
					t.Errorf("%v", got)
				}
			})
		})
	}
}

// A Runtime's Function has a sidecar as well: it serves before the loader is told to load, booted ahead or at the claim.
func TestSidecarOfRuntime(t *testing.T) {
	for name, make := range map[string]func(e *instance.Engine, id string) error{
		"booted": func(e *instance.Engine, id string) error { _, err := boot(e, id); return err },
		"cold":   create,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newSidecarFake(t)
				f.loader = func(id string, conn net.Conn) {
					converse(conn, readyLine, map[string]string{"load": `{"loaded":{}}`}, func(question string) {
						if s := f.sidecars["a.sidecar"]; question == "load" && !s.told() {
							t.Error("the loader loads before the sidecar serves")
						}
					})
				}
				e, stop := runUntil(t, f)
				defer stop()
				if err := make(e, "a"); err != nil {
					t.Fatal(err)
				}
				s := f.sidecars["a.sidecar"]
				if s.told() {
					t.Error("it serves before there is a claim")
				}
				answer, err := load(e, "a", inPython(3))
				if err != nil || answer.Instance.Address != "10.0.0.1:8012" || s.serve.Targets[0].String() != "127.0.0.1:8080" {
					t.Fatalf("%v, %v; told %+v", answer, err, s.serve)
				}
				if limit, _ := os.ReadFile(f.sidecarLimit("a")); string(limit) != strconv.Itoa(24<<20+990*64<<10) { // 1000 and a queue of 100
					t.Errorf("its memory limit is %s", limit)
				}
				if err := discard(e, "a", 1); err != nil || f.left() != nothing || len(f.sidecars) > 0 {
					t.Errorf("discard: %v; left: %s, %d sidecars", err, f.left(), len(f.sidecars))
				}
			})
		})
	}
}

// A booted Runtime that was claimed for a moment is told apart by its sidecar too.
func TestSidecarOfRuntimeAdopted(t *testing.T) {
	for name, c := range map[string]struct {
		serves string
		want   int
	}{"nobody": {"", 1}, "a function": {"hello-00001", 0}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, root := newSidecarFake(t), t.TempDir()
				e, stop := runIn(t, f, root)
				if _, err := boot(e, "a"); err != nil {
					t.Fatal(err)
				}
				stop()
				if c.serves != "" {
					s := f.sidecars["a.sidecar"]
					s.serve, s.serving = &control.Serve{Function: c.serves}, true
				}
				e, stop = runIn(t, f, root)
				defer stop()
				synctest.Wait()
				if got := list(t, e); len(got) != c.want || len(f.sidecars) != c.want {
					t.Errorf("%v, %d sidecars", got, len(f.sidecars))
				}
			})
		})
	}
}

// What is frozen keeps its address and its sidecar, over a restart too. A claim has it told the same again before the thaw.
func TestSidecarOfFrozen(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(map[bool]string{false: "thawed", true: "restarted and thawed"}[restart], func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, root := newSidecarFake(t), t.TempDir()
				e, stop := runIn(t, f, root)
				if err := create(e, "a"); err != nil {
					t.Fatal(err)
				}
				first, err := serveIn(e, "a", "c1")
				if err != nil {
					t.Fatal(err)
				}
				p, err := freeze(e, "a", 1)
				if err != nil || p.Address != first.Instance.Address {
					t.Fatalf("frozen: %v, %v", p, err)
				}
				s := f.sidecars["a.sidecar"]
				was := *s.serve
				if !s.serving {
					t.Error("it was drained to be frozen")
				}
				if restart {
					stop()
					e, stop = runIn(t, f, root)
					synctest.Wait()
				}
				defer stop()
				s.onServe = func() {
					if f.freezer(t, "a") != "FROZEN" {
						t.Error("it is told after the thaw")
					}
				}
				again, err := serveIn(e, "a", "c2")
				if err != nil || again.Instance.Address != "10.0.0.1:8012" || s.tellings != 2 || !s.serve.Equal(&was) {
					t.Errorf("thawed: %v, %v; told %d times, at last %+v", again, err, s.tellings, s.serve)
				}
			})
		})
	}
}

// A frozen Instance that is discarded is thawed first, for what it has in flight could not end otherwise.
func TestSidecarOfFrozenIsDrained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newSidecarFake(t)
		e := run(t, f)
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := serveIn(e, "a", "c1"); err != nil {
			t.Fatal(err)
		}
		if _, err := freeze(e, "a", 1); err != nil {
			t.Fatal(err)
		}
		s := f.sidecars["a.sidecar"]
		drained := ""
		s.onDrain = func() { drained = f.freezer(t, "a") }
		_, err := e.Discard(t.Context(), connect.NewRequest(&hearthv1.DiscardRequest{InstanceId: "a", Epoch: 1, Grace: durationpb.New(time.Second)}))
		if err != nil || drained != "THAWED" || f.left() != nothing {
			t.Errorf("discard: %v; drained while it was %q; left: %s", err, drained, f.left())
		}
	})
}

// Those that hang cost their own Instances, and no other's adoption, however many they are.
func TestSidecarHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, root := newSidecarFake(t), t.TempDir()
		e, stop := runIn(t, f, root)
		ids := []string{"well"}
		for n := range 20 {
			ids = append(ids, "hangs-"+strconv.Itoa(n))
		}
		for _, id := range ids {
			if err := create(e, id); err != nil {
				t.Fatal(err)
			}
		}
		stop()
		for _, id := range ids[1:] {
			f.sidecars[id+".sidecar"].hangs = true
		}
		e, stop = runIn(t, f, root)
		defer stop()
		synctest.Wait()
		if got := list(t, e); len(got) != 1 || got["well"].GetState() != hearthv1.State_STATE_WARM {
			t.Errorf("%v", got)
		}
	})
}

// The Function's own port is left to it.
func TestSidecarAddress(t *testing.T) {
	for port, want := range map[int32]string{80: "8012", 8011: "8012", 8012: "8014", 8013: "8014", 8014: "8012", 65535: "8012"} {
		got := instance.SidecarServe("10.0.0.1", &hearthv1.Revision{Name: "f-1", Port: port, Concurrency: 7})
		if got.Listen.String() != "10.0.0.1:"+want || got.Concurrency != 7 || got.Probe.Port() == uint16(port) {
			t.Errorf("port %d: %+v", port, got)
		}
	}
}

// Programs of Instances are found beside the daemon, unless they are named by a path, or not wanted.
func TestSidecarProgram(t *testing.T) {
	for given, want := range map[string]string{"": "", "none": "", "sidecar": "/bin/sidecar", "/opt/s": "/opt/s"} {
		got, err := instance.Config{
			Node: "n", Root: "/r", Address: "/c", CgroupParent: "/g", Launcher: filepath.Join("/bin", "launcher"), Sidecar: given,
		}.WithDefaults()
		if err != nil || got.Sidecar != want {
			t.Errorf("%q is %q, want %q: %v", given, got.Sidecar, want, err)
		}
	}
}
