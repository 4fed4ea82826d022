package pool_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

func python(s *hearthv1.FunctionSpec) { runIn(s, "python") }

func TestRuntimeIsKeptBooted(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		r := m.applyRuntime("python", 2)
		if r.GetGeneration() != 1 {
			t.Errorf("generation %d", r.GetGeneration())
		}
		time.Sleep(3 * time.Second)
		got := m.runtimeStatus("python")
		if n.booted("python") != 2 || n.booted("") != 3 || got.GetStatus().GetWarm() != 2 || got.GetImage() != "pinned@registry.example/runtime/python:1" {
			t.Errorf("%d booted, %d sandboxes, %v", n.booted("python"), n.booted(""), got)
		}
		m.apply("hello", python)
		m.apply("plain", nil)
		n.on(func() {
			n.start = func(r *hearthv1.Revision) error {
				if r.GetFunction() == "hello" && (r.GetRuntime().GetGeneration() != 1 || r.GetRuntime().GetImage() != "pinned@registry.example/runtime/python:1" ||
					r.GetCode().GetHandler() != "main.hello" || r.GetConcurrency() != 10) {
					t.Errorf("started %v", r)
				}
				return nil
			}
		})
		if i := m.must("hello").GetInstance(); i.GetRuntime() != "python" || i.GetDegree() != hearthv1.Degree_DEGREE_RUNTIME {
			t.Errorf("hello got %v", i)
		}
		for range 3 {
			if i := m.must("plain").GetInstance(); i.GetRuntime() != "" {
				t.Errorf("an image got %v", i)
			}
		}
		time.Sleep(3 * time.Second)
		if n.booted("python") != 2 || n.booted("") != 3 {
			t.Errorf("%d booted, %d sandboxes after the refill", n.booted("python"), n.booted(""))
		}
	})
}

// TestRuntimePoolIsEmpty: a sandbox is taken, in which the node boots; only then new ones are booted.
func TestRuntimePoolIsEmpty(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.applyRuntime("python", 0)
		m.apply("hello", python)
		begun := time.Now()
		if i := m.must("hello").GetInstance(); i.GetRuntime() != "" || time.Since(begun) != n.activateTime {
			t.Errorf("after %s: %v", time.Since(begun), i)
		}
		var last *hearthv1.Instance
		for range 3 {
			last = m.must("hello").GetInstance()
		}
		if last.GetRuntime() != "python" {
			t.Errorf("beyond the sandboxes: %v", last)
		}
		time.Sleep(3 * time.Second)
		if n.booted("python") != 0 || n.booted("") != 3 {
			t.Errorf("%d booted, %d sandboxes", n.booted("python"), n.booted(""))
		}
	})
}

func TestChangedRuntimeReplacesWhatIsWarm(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.applyRuntime("python", 2)
		m.apply("hello", python)
		time.Sleep(3 * time.Second)
		idle(t, n, m, "hello", 2, python)
		serving := m.must("hello").GetInstance() // the frozen one
		m.must("hello")
		time.Sleep(5 * time.Second)
		m.Scale("hello", 1, "less")
		time.Sleep(time.Second)
		if n.in("hello", frozen) != 1 || n.in("hello", serves) != 1 {
			t.Fatalf("%d frozen, %d serve", n.in("hello", frozen), n.in("hello", serves))
		}
		if r := m.applyRuntime("python", 2); r.GetGeneration() != 1 {
			t.Errorf("the same again: generation %d", r.GetGeneration())
		}
		if r := m.applyRuntime("python", 2, "numpy"); r.GetGeneration() != 2 {
			t.Errorf("generation %d", r.GetGeneration())
		}
		time.Sleep(5 * time.Second)
		n.on(func() {
			for _, i := range n.instances {
				if i.State == warm && i.Runtime == "python" && i.RuntimeGeneration != 2 {
					t.Errorf("%v is of before", i)
				}
			}
		})
		if n.booted("python") != 2 || n.in("hello", serves) != 1 || n.in("hello", frozen) != 0 {
			t.Errorf("%d booted, %d serve, %d frozen; what serves goes on (%s)", n.booted("python"), n.in("hello", serves), n.in("hello", frozen), serving.GetId())
		}
		if s := m.status("hello"); s.GetRevision() != "hello-00001" {
			t.Errorf("revision %s", s.GetRevision())
		}
		if i := m.must("hello").GetInstance(); i.GetRuntimeGeneration() != 2 {
			t.Errorf("started in %v", i)
		}
		m.checkIndex()
	})
}

// TestRuntimeThatDoesNotBoot has a bad image beside sandboxes and a good one.
func TestRuntimeThatDoesNotBoot(t *testing.T) {
	for _, where := range []string{"prepare", "create"} {
		t.Run(where, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *fakeNode, m *running) {
				n.on(func() {
					n.broken = func(call string, r *hearthv1.Runtime, image string) error {
						if call == where && (r.GetName() == "bad" || strings.Contains(image, "/bad:")) {
							return code(connect.CodeInternal, "exit status 1: no such loader")
						}
						return nil
					}
				})
				m.applyRuntime("bad", 2)
				m.applyRuntime("good", 2)
				m.apply("plain", nil)
				m.apply("hello", func(s *hearthv1.FunctionSpec) { runIn(s, "bad") })
				time.Sleep(5 * time.Second)
				if n.booted("good") != 2 || n.booted("") != 3 {
					t.Errorf("%d good, %d sandboxes", n.booted("good"), n.booted(""))
				}
				if s := m.runtimeStatus("bad").GetStatus(); s.GetWarm() != 0 || !strings.Contains(s.GetError(), "node node: exit status 1: no such loader") {
					t.Errorf("status %v", s)
				}
				if s := m.runtimeStatus("good").GetStatus(); s.GetError() != "" {
					t.Errorf("status of the good one: %v", s)
				}
				begun := time.Now()
				m.must("plain")
				if took := time.Since(begun); took != n.activateTime {
					t.Errorf("took %s", took)
				}
				n.on(func() { // nor is there a sandbox to boot it in
					n.before = func(call, _ string) error {
						if call == "activate" {
							return code(connect.CodeFailedPrecondition, "not this one")
						}
						return nil
					}
				})
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				_, err := m.ApplyRuntime(ctx, connect.NewRequest(&hearthv1.ApplyRuntimeRequest{Prepare: true,
					Runtime: &hearthv1.Runtime{Name: "bad", Image: "registry.example/runtime/bad:1", Warm: 2}}))
				wantCode(t, err, connect.CodeInternal)
				if err == nil || !strings.Contains(err.Error(), "no such loader") {
					t.Errorf("no reason: %v", err)
				}
				n.on(func() { n.broken = nil })
				begun = time.Now()
				// Whoever put it right need not wait for the next attempt.
				_, err = m.ApplyRuntime(ctx, connect.NewRequest(&hearthv1.ApplyRuntimeRequest{Prepare: true,
					Runtime: &hearthv1.Runtime{Name: "bad", Image: "registry.example/runtime/bad:1", Warm: 2}}))
				if took := time.Since(begun); err != nil || took > n.prepareTime+4*n.createTime {
					t.Errorf("took %s, %v, status %v", took, err, m.runtimeStatus("bad"))
				}
				if n.booted("bad") != 2 || m.runtimeStatus("bad").GetStatus().GetError() != "" {
					t.Errorf("%d booted once it can: %v", n.booted("bad"), m.runtimeStatus("bad"))
				}
			})
		})
	}
}

// TestNoneIsMadeTwice: what is being made for a request is counted, also while the node has not said what it will be.
func TestNoneIsMadeTwice(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.applyRuntime("python", 0)
		m.apply("hello", func(s *hearthv1.FunctionSpec) { runIn(s, "python") })
		time.Sleep(time.Minute)
		n.on(func() {
			n.before = func(call, id string) error { // nothing there can be had
				if call == "activate" && n.instances[id].GetRuntime() == "" {
					return code(connect.CodeFailedPrecondition, "not this one")
				}
				return nil
			}
		})
		before := n.made()
		m.must("hello")
		time.Sleep(time.Minute)
		if more := n.made() - before; more > 8 {
			t.Errorf("%d instances made for one request", more)
		}
	})
}

// TestRuntimeThatHangs: a boot that does not end keeps nobody else from being made.
func TestRuntimeThatHangs(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		n.on(func() {
			n.broken = func(call string, r *hearthv1.Runtime, _ string) error {
				if call == "create" && r != nil {
					n.sleep(50 * time.Second)
					return code(connect.CodeInternal, "not ready in time")
				}
				return nil
			}
		})
		m.applyRuntime("slow", 1)
		time.Sleep(time.Second)
		m.apply("plain", nil)
		for range 3 {
			m.must("plain")
		}
		time.Sleep(10 * time.Second)
		if n.booted("") != 3 {
			t.Errorf("%d sandboxes", n.booted(""))
		}
	})
}

func TestErrorOfAllocateNamesTheRuntime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		c.PoolSize = -1
		n.broken = func(call string, r *hearthv1.Runtime, _ string) error {
			if call == "create" {
				return code(connect.CodeInternal, "no such loader")
			}
			return nil
		}
		m := start(t, c)
		defer m.stop()
		m.applyRuntime("python", 1)
		m.apply("hello", python)
		_, err := m.allocate("hello", "", 5*time.Second)
		wantCode(t, err, connect.CodeResourceExhausted)
		if err == nil || !strings.Contains(err.Error(), "runtime python") || !strings.Contains(err.Error(), "no such loader") {
			t.Errorf("error %v", err)
		}
	})
}

func TestApplyRuntimePrepares(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		spec := &hearthv1.Runtime{Name: "python", Image: "registry.example/runtime/python:1", Warm: 2}
		if _, err := m.ApplyRuntime(t.Context(), connect.NewRequest(&hearthv1.ApplyRuntimeRequest{Runtime: spec, Prepare: true})); err != nil {
			t.Fatal(err)
		}
		if n.booted("python") != 2 {
			t.Errorf("%d booted", n.booted("python"))
		}
	})
}

func TestDeleteRuntime(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		remove := func(name string) error {
			_, err := m.DeleteRuntime(t.Context(), connect.NewRequest(&hearthv1.DeleteRuntimeRequest{Name: name}))
			return err
		}
		wantCode(t, remove("python"), connect.CodeNotFound)
		m.applyRuntime("python", 2)
		m.apply("hello", python)
		time.Sleep(3 * time.Second)
		wantCode(t, remove("python"), connect.CodeFailedPrecondition)
		if _, err := m.Delete(t.Context(), connect.NewRequest(&hearthv1.DeleteRequest{Name: "hello"})); err != nil {
			t.Fatal(err)
		}
		if err := remove("python"); err != nil || n.booted("python") != 0 {
			t.Errorf("%v, %d booted", err, n.booted("python"))
		}
		wantCode(t, remove("python"), connect.CodeNotFound)
		if withImage, ok := n.forgot("python-runtime-g1"); !ok || !withImage {
			t.Errorf("forgotten %t, with its image %t", ok, withImage)
		}
		_, err := m.Apply(t.Context(), connect.NewRequest(&hearthv1.ApplyRequest{Function: &hearthv1.Function{Name: "hello", Spec: func() *hearthv1.FunctionSpec {
			s := &hearthv1.FunctionSpec{}
			python(s)
			return s
		}()}}))
		wantCode(t, err, connect.CodeFailedPrecondition)
		if r := m.applyRuntime("python", 1); r.GetGeneration() != 2 {
			t.Errorf("generation %d of a name that was used before", r.GetGeneration())
		}
	})
}

func TestRuntimesSurviveRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		m := start(t, c)
		m.applyRuntime("python", 2)
		m.apply("hello", python)
		time.Sleep(3 * time.Second)
		m.stop()
		m = start(t, c)
		defer m.stop()
		made := n.made()
		time.Sleep(5 * time.Second)
		if n.booted("python") != 2 || n.made() != made {
			t.Errorf("%d booted, %d made after %d", n.booted("python"), n.made(), made)
		}
		if i := m.must("hello").GetInstance(); i.GetRuntime() != "python" {
			t.Errorf("got %v", i)
		}
	})
}

// TestSecretsStayInside: nodes get them, and nobody else.
func TestSecretsStayInside(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		g := m.gateway("g")
		defer g.leave()
		withSecret := func(value string) func(*hearthv1.FunctionSpec) {
			return func(s *hearthv1.FunctionSpec) { s.Secrets = map[string][]byte{"key": []byte(value)} }
		}
		got := ""
		n.on(func() {
			n.start = func(r *hearthv1.Revision) error {
				got = string(r.GetSecrets()["key"])
				return nil
			}
		})
		f := m.apply("hello", withSecret("s3cret"))
		m.must("hello")
		list, err := m.List(t.Context(), connect.NewRequest(&hearthv1.ListRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		settle()
		for where, said := range map[string]interface{ String() string }{"apply": f, "list": list.Msg, "watch": g.latest["hello"], "status": m.status("hello")} {
			if strings.Contains(said.String(), "s3cret") {
				t.Errorf("%s tells it: %v", where, said)
			}
		}
		if _, named := f.GetSpec().GetSecrets()["key"]; !named || got != "s3cret" {
			t.Errorf("named %t, the node got %q", named, got)
		}
		if again := m.apply("hello", withSecret("")); again.GetStatus().GetGeneration() != 1 {
			t.Errorf("what was shown, applied again: %v", again.GetStatus())
		}
		if changed := m.apply("hello", withSecret("other")); changed.GetStatus().GetRevision() != "hello-00002" {
			t.Errorf("another secret: %v", changed.GetStatus())
		}
		_, err = m.Apply(t.Context(), connect.NewRequest(&hearthv1.ApplyRequest{Function: &hearthv1.Function{Name: "new",
			Spec: &hearthv1.FunctionSpec{Image: "a", Secrets: map[string][]byte{"key": nil}}}}))
		wantCode(t, err, connect.CodeInvalidArgument)
	})
}

func TestValidateRuntime(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*hearthv1.Runtime)
		want   string
	}{
		{"fine", func(*hearthv1.Runtime) {}, ""},
		{"no name", func(r *hearthv1.Runtime) { r.Name = "" }, "name: is empty"},
		{"no image", func(r *hearthv1.Runtime) { r.Image = "" }, "image: is empty"},
		{"env", func(r *hearthv1.Runtime) { r.Env = map[string]string{"A=": ""} }, "env: "},
		{"comma", func(r *hearthv1.Runtime) { r.Preload = []string{"numpy", "a,b"} }, "preload[1]"},
		{"line end", func(r *hearthv1.Runtime) { r.Preload = []string{"a\n"} }, "preload[0]"},
		{"warm", func(r *hearthv1.Runtime) { r.Warm = -1 }, "warm: -1"},
	} {
		r := &hearthv1.Runtime{Name: "python", Image: "a", Preload: []string{"numpy"}, Warm: 3}
		c.change(r)
		if err := pool.ValidateRuntime(r); c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
	}
	if pool.ValidateRuntime(nil) == nil {
		t.Error("nothing is fine")
	}
}
