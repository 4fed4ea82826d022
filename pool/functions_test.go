package pool_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

func TestApplyMakesRevisions(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		f := m.apply("hello", nil)
		if s := f.GetStatus(); s.GetRevision() != "hello-00001" || s.GetGeneration() != 1 {
			t.Errorf("first: %v", s)
		}
		if s := m.apply("hello", nil).GetStatus(); s.GetGeneration() != 1 {
			t.Errorf("the same again: %v", s)
		}
		scaled := m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Scaling.Max = 7 })
		if s := scaled.GetStatus(); s.GetGeneration() != 2 || s.GetRevision() != "hello-00001" {
			t.Errorf("scaling alone: %v", s)
		}
		if s := m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Port = 9 }).GetStatus(); s.GetRevision() != "hello-00002" {
			t.Errorf("port: %v", s)
		}
		if _, err := m.Delete(t.Context(), connect.NewRequest(&hearthv1.DeleteRequest{Name: "hello"})); err != nil {
			t.Fatal(err)
		}
		if s := m.apply("hello", nil).GetStatus(); s.GetRevision() != "hello-00003" || s.GetGeneration() != 1 {
			t.Errorf("after a deletion: %v", s)
		}
	})
}

func TestApplyPreparesAndPins(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		spec := &hearthv1.FunctionSpec{Image: "registry.example/hello:1"}
		req := &hearthv1.ApplyRequest{Prepare: true, Function: &hearthv1.Function{Name: "hello", Spec: spec}}
		if _, err := m.Apply(t.Context(), connect.NewRequest(req)); err != nil {
			t.Fatal(err)
		}
		if got := n.preparations("hello-00001"); got != 1 {
			t.Errorf("prepared %d times", got)
		}
		n.on(func() {
			n.start = func(r *hearthv1.Revision) error {
				if r.GetImage() != "pinned@registry.example/hello:1" || r.GetPort() != 8080 {
					t.Errorf("started %v", r)
				}
				return nil
			}
		})
		m.must("hello")
		n.on(func() { n.start = nil })
		n.on(func() {
			n.before = func(call, _ string) error {
				if call == "prepare" {
					return code(connect.CodeNotFound, "no such image")
				}
				return nil
			}
		})
		spec.Image = "registry.example/none"
		_, err := m.Apply(t.Context(), connect.NewRequest(req))
		wantCode(t, err, connect.CodeNotFound)
	})
}

// TestApplyWaitsForGateways deploys while one gateway hears of it late, another never, and a third is gone.
func TestFunctionsByName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := start(t, one(newFakeNode(t, "node")))
		defer m.stop()
		for n := range 250 { // more than are listed at once
			m.apply(fmt.Sprintf("f-%d", n), nil)
		}
		if got := len(m.Functions()); got != 250 {
			t.Errorf("%d Functions are listed, not 250", got)
		}
		if got := m.Functions("f-7", "none"); len(got) != 1 || got[0].GetName() != "f-7" || got[0].GetSpec() == nil {
			t.Errorf("f-7 and one that is not there are %v", got)
		}
	})
}

func TestApplyWaitsForGateways(t *testing.T) {
	bubble(t, func(t *testing.T, _ *fakeNode, m *running) {
		prompt, gone := m.gateway("prompt"), m.gateway("gone")
		gone.leave()
		defer prompt.leave()
		acknowledged := make(chan time.Time, 1)
		go func() {
			for prompt.at() == 0 {
				time.Sleep(time.Millisecond)
			}
			time.Sleep(300 * time.Millisecond)
			m.Acknowledge("prompt", prompt.at(), nil)
			acknowledged <- time.Now()
		}()
		m.apply("hello", nil)
		if at := <-acknowledged; !time.Now().Equal(at) {
			t.Errorf("Apply answered %s after the gateway's word", time.Since(at))
		}
		silent := m.gateway("silent")
		defer silent.leave()
		begin := time.Now()
		m.apply("other", nil)
		if took := time.Since(begin); took != 2*time.Second {
			t.Errorf("a gateway that hangs held up Apply for %s", took)
		}
	})
}

func TestRollOut(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		m.must("hello")
		m.must("hello")
		g := m.gateway("g")
		defer g.leave()
		n.on(func() { n.activateTime = 5 * time.Second })
		begin := time.Now()
		m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Env = map[string]string{"A": "1"} })
		time.Sleep(4*time.Second - time.Since(begin)) // the gateway acknowledges nothing, for which Apply waits a little
		if got := g.serving("hello"); len(got) != 2 {
			t.Errorf("%d serve while the new revision starts, want the 2 old ones", len(got))
		}
		time.Sleep(2 * time.Second)
		if got := g.serving("hello"); len(got) != 1 || m.status("hello").GetReady() != 1 {
			t.Errorf("%v serve, want the new one alone", got)
		}
		m.Acknowledge("g", g.at(), nil)
		time.Sleep(time.Second)
		if remove, ok := n.forgot("hello-00001"); !ok || remove || n.in("hello", serves) != 1 {
			t.Errorf("forgotten %t, with its image %t, %d serve", ok, remove, n.in("hello", serves))
		}
	})
}

func TestDelete(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		m.must("hello")
		if _, err := m.Delete(t.Context(), connect.NewRequest(&hearthv1.DeleteRequest{Name: "hello"})); err != nil {
			t.Fatal(err)
		}
		if remove, _ := n.forgot("hello-00001"); !remove || n.in("hello", serves) != 0 {
			t.Errorf("forgotten with its image %t, %d serve", remove, n.in("hello", serves))
		}
		_, err := m.Delete(t.Context(), connect.NewRequest(&hearthv1.DeleteRequest{Name: "hello"}))
		wantCode(t, err, connect.CodeNotFound)
		_, err = m.allocate("hello", "", time.Second)
		wantCode(t, err, connect.CodeNotFound)
	})
}

func TestMinimumIsKept(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Scaling.Min = 2 })
		time.Sleep(time.Second)
		if got := m.status("hello").GetReady(); got != 2 {
			t.Fatalf("%d ready, want 2", got)
		}
		m.Scale("hello", 0, "nothing to do")
		time.Sleep(time.Minute)
		if got := m.status("hello").GetReady(); got != 2 {
			t.Errorf("%d ready after a wish for none, want 2", got)
		}
		m.release(&hearthv1.ReleaseRequest{Function: "hello", Wait: true})
		time.Sleep(time.Second)
		if got := m.status("hello").GetReady(); got != 2 {
			t.Errorf("%d ready after a release, want 2", got)
		}
	})
}

func TestMinimumOfAFunctionThatDoesNotStartRests(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		starts := 0
		n.on(func() {
			n.start = func(*hearthv1.Revision) error {
				starts++
				return code(connect.CodeInternal, "exit status 1")
			}
		})
		m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Scaling.Min = 1 })
		time.Sleep(time.Minute)
		n.on(func() {
			if starts < 5 || starts > 12 {
				t.Errorf("%d starts in a minute", starts)
			}
		})
	})
}

func TestScale(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", func(s *hearthv1.FunctionSpec) { s.Scaling.Max = 4 })
		m.Scale("hello", 9, "much to do")
		time.Sleep(2 * time.Second)
		s := m.status("hello")
		if s.GetReady() != 4 || s.GetDesired() != 4 || s.GetReason() != "much to do" {
			t.Errorf("status %v", s)
		}
		m.Scale("hello", 1, "too early")
		time.Sleep(time.Second)
		if got := m.status("hello").GetReady(); got != 4 {
			t.Errorf("%d ready: the young ones were given up", got)
		}
		time.Sleep(5 * time.Second)
		m.Scale("hello", 1, "less to do")
		time.Sleep(time.Second)
		if got := m.status("hello").GetReady(); got != 1 {
			t.Errorf("%d ready, want 1", got)
		}
		m.Scale("nobody", 3, "")
	})
}

func TestRestartAdoptsWhatServesAndDiscardsWhatIsUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		m := start(t, c)
		time.Sleep(time.Second)
		m.apply("known", nil)
		m.apply("unknown", nil)
		res, err := m.allocate("known", "same", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		m.must("unknown")
		n.on(func() { n.activateTime = 5 * time.Second })
		go func() { _, _ = m.allocate("known", "late", 10*time.Second) }()
		time.Sleep(time.Second)
		m.stop()
		c.Store.(*memory).records["unknown"] = storeTombstone("unknown")
		m = start(t, c)
		defer m.stop()
		again, err := m.allocate("known", "same", time.Minute)
		if err != nil || again.GetInstance().GetId() != res.GetInstance().GetId() {
			t.Errorf("the allocation of before: %v, %v; want %s", again, err, res.GetInstance().GetId())
		}
		time.Sleep(time.Minute)
		if n.in("known", serves) != 2 || n.in("unknown", serves) != 0 || n.in("*", claimed) != 0 || n.in("*", warm) != 3 {
			t.Errorf("%d, %d, %d, %d", n.in("known", serves), n.in("unknown", serves), n.in("*", claimed), n.in("*", warm))
		}
		n.check()
	})
}

// Whoever asked the manager of before asks the next one by the same id, at whatever moment: it gets the Instance that was claimed for it then,
// and no second one is.
func TestAllocationOutlivesItsTerm(t *testing.T) {
	for name, c := range map[string]struct {
		asked   time.Duration // before the manager is killed
		away    time.Duration // of the node after that
		waiting time.Duration // before it is asked again
	}{
		"it has begun":                        {time.Second, 0, time.Second},
		"it has begun, the node tells later":  {time.Second, 3 * time.Second, 0},
		"it is done":                          {10 * time.Second, 0, time.Second},
		"it is done, the node tells later":    {10 * time.Second, 3 * time.Second, 0},
		"it ends while the manager is away":   {4 * time.Second, 0, 3 * time.Second},
		"it ends before the node tells of it": {4 * time.Second, 3 * time.Second, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newFakeNode(t, "node")
				n.activateTime = 5 * time.Second
				config := one(n)
				m := start(t, config)
				time.Sleep(time.Second)
				m.apply("f", nil)
				asked := make(chan struct{})
				go func() {
					_, _ = m.allocate("f", "same", time.Minute)
					close(asked)
				}()
				time.Sleep(c.asked)
				n.on(func() { n.down = c.away > 0 })
				defer m.stop()
				m.cancel() // and what it has begun goes on
				<-asked
				m = start(t, config)
				defer m.stop()
				time.Sleep(c.waiting)
				time.AfterFunc(c.away, func() { n.on(func() { n.down = false }) })
				res, err := m.allocate("f", "same", time.Minute)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				if got := allocationOf(res.GetInstance().GetClaim().GetId()); got != "same" || n.in("f", serves) != 1 || n.in("f", claimed) != 0 {
					t.Errorf("claim of %q, %d serve, %d are claimed", got, n.in("f", serves), n.in("f", claimed))
				}
				n.check()
			})
		})
	}
}

func allocationOf(claim string) string { return claim[:strings.LastIndexByte(claim, '/')] }

func TestPreparedAgainWhenANodeComesBack(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("a", nil)
		m.apply("b", nil)
		time.Sleep(time.Second)
		n.kill(time.Second)
		time.Sleep(5 * time.Second)
		if a, b := n.preparations("a-00001"), n.preparations("b-00001"); a != 2 || b != 2 {
			t.Errorf("prepared %d and %d times, want 2", a, b)
		}
	})
}

func TestStoreThatFails(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
	})
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t, "node")
		c := one(n)
		m := start(t, c)
		defer m.stop()
		time.Sleep(time.Second)
		c.Store.(*memory).fail = errors.New("no space left on device")
		_, err := m.Apply(t.Context(), connect.NewRequest(&hearthv1.ApplyRequest{Function: &hearthv1.Function{Name: "a", Spec: &hearthv1.FunctionSpec{Image: "x"}}}))
		wantCode(t, err, connect.CodeInternal)
		_, err = m.Get(t.Context(), connect.NewRequest(&hearthv1.GetRequest{Name: "a"}))
		wantCode(t, err, connect.CodeNotFound)
		if _, err := pool.New(c); err == nil {
			t.Error("a manager without a term")
		}
	})
}

func TestValidate(t *testing.T) {
	good := func() *hearthv1.FunctionSpec { return &hearthv1.FunctionSpec{Image: "a"} }
	for _, c := range []struct {
		name   string
		fn     string
		change func(*hearthv1.FunctionSpec)
		want   string
	}{
		{"fine", "hello-2", func(*hearthv1.FunctionSpec) {}, ""},
		{"no name", "", func(*hearthv1.FunctionSpec) {}, "name: is empty"},
		{"upper case", "Hello", func(*hearthv1.FunctionSpec) {}, "no DNS label"},
		{"hyphen", "-hello", func(*hearthv1.FunctionSpec) {}, "no DNS label"},
		{"long name", strings.Repeat("a", 41), func(*hearthv1.FunctionSpec) {}, "at most 40"},
		{"longest name", strings.Repeat("a", 40), func(*hearthv1.FunctionSpec) {}, ""},
		{"no image", "a", func(s *hearthv1.FunctionSpec) { s.Image = "" }, "spec.image"},
		{"image with space", "a", func(s *hearthv1.FunctionSpec) { s.Image = "a b" }, "spec.image"},
		{"port", "a", func(s *hearthv1.FunctionSpec) { s.Port = 65536 }, "spec.port"},
		{"env", "a", func(s *hearthv1.FunctionSpec) { s.Env = map[string]string{"A=B": ""} }, "spec.env"},
		{"arg", "a", func(s *hearthv1.FunctionSpec) { s.Args = []string{"a\x00"} }, "spec.args[0]"},
		{"host", "a", func(s *hearthv1.FunctionSpec) { s.Hosts = []string{"www.example.org", "a:80"} }, "spec.hosts[1]"},
		{"concurrency", "a", func(s *hearthv1.FunctionSpec) { s.Scaling = &hearthv1.Scaling{Concurrency: -1} }, "spec.scaling.concurrency"},
		{"min over max", "a", func(s *hearthv1.FunctionSpec) { s.Scaling = &hearthv1.Scaling{Min: 3, Max: 2} }, "spec.scaling.min"},
		{"min over default max", "a", func(s *hearthv1.FunctionSpec) { s.Scaling = &hearthv1.Scaling{Min: 11} }, "spec.scaling.min"},
		{"window", "a", func(s *hearthv1.FunctionSpec) { s.Scaling = &hearthv1.Scaling{Window: seconds(-1)} }, "spec.scaling.window"},
		{"grace", "a", func(s *hearthv1.FunctionSpec) { s.Scaling = &hearthv1.Scaling{Grace: seconds(3601)} }, "spec.scaling.grace"},
		{"no code", "a", func(s *hearthv1.FunctionSpec) { s.Image, s.Runtime = "", "python" }, "spec.code: is missing"},
		{"code and image", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "python"); s.Image = "a" }, "spec.image"},
		{"code alone", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "") }, "spec.runtime"},
		{"code and runtime", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "python") }, ""},
		{"writable root of a runtime", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "python"); s.WritableRoot = true }, "spec.writable_root"},
		{"command of a runtime", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "python"); s.Args = []string{"x"} }, "spec.command"},
		{"package", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "python"); s.Code.Package = "" }, "spec.code.package"},
		{"package by tag", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "python"); s.Code.Package = "registry.example/code:1" }, "spec.code.package"},
		{"handler", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "python"); s.Code.Handler = strings.Repeat("a", 1025) }, "spec.code.handler"},
		{"handler with a line end", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "python"); s.Code.Handler = "a\nb" }, "spec.code.handler"},
		{"signature", "a", func(s *hearthv1.FunctionSpec) { runIn(s, "python"); s.Code.Signature = 9 }, "spec.code.signature"},
		{"secret's name", "a", func(s *hearthv1.FunctionSpec) { s.Secrets = map[string][]byte{"../x": {1}} }, "spec.secrets"},
		{"secrets", "a", func(s *hearthv1.FunctionSpec) { s.Secrets = map[string][]byte{"x": make([]byte, 64<<10)} }, "spec.secrets"},
		{"frozen", "a", func(s *hearthv1.FunctionSpec) { s.Scaling = &hearthv1.Scaling{Frozen: 1 << 20} }, "spec.scaling.frozen"},
		{"no frozen", "a", func(s *hearthv1.FunctionSpec) { s.Scaling = &hearthv1.Scaling{Frozen: -1} }, ""},
		{"memory", "a", func(s *hearthv1.FunctionSpec) { s.Resources = &hearthv1.Resources{MemoryBytes: -1} }, "spec.resources"},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := good()
			c.change(spec)
			err := pool.Validate(c.fn, spec)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	if err := pool.Validate("a", nil); err == nil {
		t.Error("no spec is fine")
	}
}
