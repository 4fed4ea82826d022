package control_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/sidecar/control"
)

const serve = `{"serve":{"function":"hello-00001","listen":"0.0.0.0:8012","probe":"0.0.0.0:8013","targets":["127.0.0.1:8080","[::1]:8080"],"concurrency":10,"queue":100}}`

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		line string
		says string // of the error; none if it is empty
	}{
		"serve":                {serve, ""},
		"drain":                {`{"drain":{}}`, ""},
		"unknown fields":       {`{"drain":{"x":1},"y":2}`, ""},
		"nothing":              {`{}`, "0 things"},
		"null":                 {`null`, "0 things"},
		"only what is unknown": {`{"thaw":{}}`, "0 things"},
		"two things":           {`{"drain":{},"ready":{}}`, "2 things"},
		"no object":            {`[]`, "control:"},
		"cut":                  {serve[:40], "control:"},
		"no function":          {strings.Replace(serve, "hello-00001", "", 1), "function"},
		"long function":        {strings.Replace(serve, "hello", strings.Repeat("x", 200), 1), "function"},
		"no listen":            {strings.Replace(serve, "0.0.0.0:8012", "", 1), "listen"},
		"listen on a name":     {strings.Replace(serve, "0.0.0.0:8012", "example.org:80", 1), "control:"},
		"no target":            {strings.Replace(serve, `"127.0.0.1:8080","[::1]:8080"`, "", 1), "targets"},
		"empty target":         {strings.Replace(serve, "127.0.0.1:8080", "", 1), "target"},
		"target without port":  {strings.Replace(serve, "127.0.0.1:8080", "127.0.0.1:0", 1), "target"},
		"many targets":         {strings.Replace(serve, `"[::1]:8080"`, strings.TrimSuffix(strings.Repeat(`"[::1]:1",`, 9), ","), 1), "targets"},
		"no concurrency":       {strings.Replace(serve, `:10,`, `:0,`, 1), "concurrency"},
		"negative queue":       {strings.Replace(serve, `:100}`, `:-1}`, 1), "queue"},
		"huge queue":           {strings.Replace(serve, `:100}`, `:10000000}`, 1), "queue"},
		"too long":             {`{"drain":{}}` + strings.Repeat(" ", 64<<10), "bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := control.Parse([]byte(c.line))
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
		})
	}
}

// FuzzParse: whatever is accepted is written and read again as the same.
func FuzzParse(f *testing.F) {
	for _, line := range []string{
		serve, `{"drain":{}}`, `{"status":{"protocol":1,"function":"f","serving":true,"ready":true,"in_flight":3}}`,
		`{"serving":{"listen":"0.0.0.0:8012"}}`, `{"drained":{}}`, `{"failed":{"error":"no"}}`, `{"ready":{}}`,
		`{"refused":{"error":"connection refused"}}`, `{}`, `null`, `{"serve":null}`, "\x00", `{"serve":{"queue":1e400}}`,
		`{"serve":{"listen":"[fe80::1%eth0]:1","targets":["[::ffff:1.2.3.4]:9"]}}`,
	} {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := control.Parse(line)
		if err != nil {
			return
		}
		text, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		again, err := control.Parse(text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if m.Serve != nil && (again.Serve == nil || !m.Serve.Equal(again.Serve)) {
			t.Errorf("%s is read again as another", text)
		}
	})
}

// fakeSidecar records.
type fakeSidecar struct {
	drains  chan struct{} // one for each that begins
	release chan struct{}
}

func (*fakeSidecar) Serve(s *control.Serve) (control.Serving, error) {
	if s.Function == "other" {
		return control.Serving{}, errors.New("no: " + strings.Repeat("x", 10<<10))
	}
	return control.Serving{Listen: s.Listen}, nil
}

func (f *fakeSidecar) Drain(ctx context.Context) error {
	f.drains <- struct{}{}
	select {
	case <-f.release:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// session runs a sidecar's end, and returns the other one.
func session(t *testing.T) (net.Conn, *control.Session, *fakeSidecar) {
	t.Helper()
	here, there := net.Pipe()
	s, f := control.NewSession(there), &fakeSidecar{make(chan struct{}, 10), make(chan struct{}, 10)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.Run(context.Background(), control.Status{Function: "hello-00001", Ready: true}, f)
	}()
	t.Cleanup(func() {
		_ = here.Close()
		<-ended
	})
	_ = here.SetDeadline(time.Now().Add(30 * time.Second))
	return here, s, f
}

// Whatever is said to a sidecar, it answers or hangs up.
func TestHostileQuestions(t *testing.T) {
	for name, line := range map[string]string{
		"garbage": "\x00\xff\n", "too long": strings.Repeat("x", 65<<10), "an answer": `{"drained":{}}` + "\n", "nothing": "{}\n",
	} {
		t.Run(name, func(t *testing.T) {
			conn, _, _ := session(t)
			in := bufio.NewReader(conn)
			if first, err := in.ReadString('\n'); err != nil || !strings.HasPrefix(first, `{"status":{"protocol":1,"function":"hello-00001"`) {
				t.Fatalf("%q %v", first, err)
			}
			go func() { _, _ = io.WriteString(conn, line) }()
			if answer, err := in.ReadString('\n'); err != nil || !strings.HasPrefix(answer, `{"failed"`) {
				t.Errorf("%q %v", answer, err)
			}
		})
	}
}

func dial(t *testing.T, conn net.Conn) *control.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, err := control.NewClient(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestConversation(t *testing.T) {
	conn, s, f := session(t)
	s.Tell(control.Ready, "")
	c := dial(t, conn)
	if st := c.Status(); st.Function != "hello-00001" || !st.Ready {
		t.Errorf("%+v", st)
	}
	events := make(chan control.Event, 10)
	var all sync.WaitGroup
	all.Go(func() {
		err := c.Follow(func(e control.Event, reason string) {
			if e == control.Refused && reason != "why" {
				t.Errorf("reason %q", reason)
			}
			events <- e
		})
		if err != nil {
			t.Errorf("follow: %v", err)
		}
	})
	m, err := control.Parse([]byte(serve))
	if err != nil {
		t.Fatal(err)
	}
	if at, err := c.Serve(t.Context(), *m.Serve); err != nil || at.Listen != m.Serve.Listen {
		t.Errorf("%v %v", at, err)
	}
	if e := <-events; e != control.Ready {
		t.Errorf("event %d", e)
	}
	m.Serve.Function = "other"
	if _, err := c.Serve(t.Context(), *m.Serve); err == nil || !strings.Contains(err.Error(), "no: xxx") || len(err.Error()) > 3<<10 {
		t.Errorf("%.100v", err)
	}
	f.release <- struct{}{}
	if err := c.Drain(t.Context()); err != nil {
		t.Error(err)
	}
	s.Tell(control.Refused, "why")
	if e := <-events; e != control.Refused {
		t.Errorf("event %d", e)
	}
	// A drain that is given up ends the connection, so that its answer is nobody else's.
	ctx, cancel := context.WithCancel(t.Context())
	<-f.drains
	all.Go(func() {
		<-f.drains
		cancel()
	})
	if err := c.Drain(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	all.Wait()
	if _, err := c.Serve(t.Context(), *m.Serve); err == nil {
		t.Error("the connection goes on")
	}
}

// A sidecar that says nonsense, or nothing, does not hold nodeagent.
func TestHostileSidecar(t *testing.T) {
	for name, first := range map[string]string{
		"nothing": "", "garbage": "\x00\n", "another protocol": `{"status":{"protocol":2}}` + "\n", "no status": `{"ready":{}}` + "\n",
		"too long": strings.Repeat(" ", 65<<10),
	} {
		t.Run(name, func(t *testing.T) {
			here, there := net.Pipe()
			var writing sync.WaitGroup
			writing.Go(func() {
				_, _ = io.WriteString(there, first)
				if first == "" {
					_ = there.Close()
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			if _, err := control.NewClient(ctx, here); err == nil || ctx.Err() != nil {
				t.Errorf("%v, %v", err, ctx.Err())
			}
			writing.Wait()
			_ = there.Close()
		})
	}
	t.Run("silent", func(t *testing.T) {
		here, there := net.Pipe()
		defer func() { _ = there.Close() }()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := control.NewClient(ctx, here); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Run("ends", func(t *testing.T) {
		here, there := net.Pipe()
		var all sync.WaitGroup
		all.Go(func() {
			_, _ = io.WriteString(there, `{"status":{"protocol":1}}`+"\n"+`{"drained":{}}`+"\n"+`{"ready":{}}`+"\n")
			_, _ = bufio.NewReader(there).ReadString('\n') // the question
			_ = there.Close()
		})
		c := dial(t, here)
		told := make(chan struct{})
		all.Go(func() {
			if err := c.Follow(func(control.Event, string) { close(told) }); !errors.Is(err, control.ErrClosed) {
				t.Errorf("follow: %v", err)
			}
		})
		<-told
		if err := c.Drain(t.Context()); err == nil {
			t.Error("an answer from before the question is taken for its own")
		}
		all.Wait()
	})
}
