package instance_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hearth-serverless/hearth/instance"
)

const readyLine = `{"ready":{"protocol":1,"runtime":"python 3.11","loaded":false,"missing":{"nosuch":"No module"}}}` + "\n"

// wellBehaved is a loader that does what docs/RUNTIMES.md says, for as long as it is connected.
func wellBehaved(_ string, conn net.Conn) {
	converse(conn, readyLine, map[string]string{
		"load":   `{"loaded":{"phases":{"import":0.5,"listen":0.25}}}`,
		"thawed": `{"resumed":{}}`,
	})
}

// converse greets and answers questions by their names; heard is told of each before.
func converse(conn net.Conn, greeting string, answers map[string]string, heard ...func(question string)) {
	if _, err := io.WriteString(conn, greeting); err != nil {
		return
	}
	for dec := json.NewDecoder(conn); ; {
		var question map[string]json.RawMessage
		if dec.Decode(&question) != nil {
			return
		}
		for name := range question {
			for _, hear := range heard {
				hear(name)
			}
			if _, err := io.WriteString(conn, answers[name]+"\n"); err != nil {
				return
			}
		}
	}
}

// TestLoaderOverASocket has the whole conversation on a Unix socket, as it is between processes.
func TestLoaderOverASocket(t *testing.T) {
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	heard := make(chan []byte, 2)
	served := make(chan struct{})
	go func() {
		defer close(served)
		conn, err := listener.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, readyLine)
		dec := json.NewDecoder(conn)
		for _, answer := range []string{`{"loaded":{"phases":{"import":0.5,"listen":0.25},"more":1},"unknown":[]}`, `{"resumed":{}}`} {
			var question json.RawMessage
			if err := dec.Decode(&question); err != nil {
				t.Error(err)
				return
			}
			heard <- question
			_, _ = io.WriteString(conn, answer+"\n")
		}
		_, _ = io.Copy(io.Discard, conn) // until it is let go of
	}()
	conn, err := net.Dial("unix", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	l := instance.NewLoader(conn, nil)
	ready, err := l.Greet(t.Context())
	if err != nil || ready.Runtime != "python 3.11" || ready.Loaded || ready.Missing["nosuch"] != "No module" {
		t.Fatalf("greeted by %+v, %v", ready, err)
	}
	phases, executing, err := l.Load(t.Context(), instance.LoadQuestion{
		Code: "/workspace", Handler: "main.f", Signature: "http", Address: "0.0.0.0:1", Env: map[string]string{"A": "<&>\n\u2028"},
	})
	if want := []instance.LoadPhase{{Name: "import", Duration: time.Second / 2}, {Name: "listen", Duration: time.Second / 4}}; err != nil || executing || !slices.Equal(phases, want) {
		t.Errorf("loaded with %v, %v, %v", phases, executing, err)
	}
	first := wantQuestion(t, <-heard, "load")
	if env := first["env"].(map[string]any); env["A"] != "<&>\n\u2028" || first["code"] != "/workspace" || first["handler"] != "main.f" {
		t.Errorf("it heard %v", first)
	}
	if err := l.Thawed(t.Context(), 90*time.Minute); err != nil {
		t.Error(err)
	}
	second := wantQuestion(t, <-heard, "thawed")
	if second["frozen"] != 5400.0 || second["seed"] == first["seed"] {
		t.Errorf("it heard %v after %v", second, first["seed"])
	}
	l.Close()
	<-served
	if err := l.Gone(); err != nil {
		t.Errorf("it is gone because of %v", err)
	}
	if err := listener.Close(); err != nil {
		t.Error(err)
	}
}

// wantQuestion reads a question with a seed of 32 bytes.
func wantQuestion(t *testing.T, line []byte, name string) map[string]any {
	t.Helper()
	var all map[string]map[string]any
	if err := json.Unmarshal(line, &all); err != nil || all[name] == nil {
		t.Fatalf("%s, %v: want a %s", line, err, name)
	}
	seed, err := base64.StdEncoding.DecodeString(all[name]["seed"].(string))
	if err != nil || len(seed) != 32 || bytes.Equal(seed, make([]byte, 32)) {
		t.Errorf("seed %x, %v", seed, err)
	}
	return all[name]
}

// TestLoadersThatMisbehave: each ends the conversation with an error that says why, and nothing is left running.
func TestLoadersThatMisbehave(t *testing.T) {
	long := strings.Repeat("x", 2<<20)
	for name, c := range map[string]struct {
		greeting, answer, says string
	}{
		"says nothing and goes":     {"", "", "ended the connection"},
		"no JSON":                   {"hello\n", "", "malformed"},
		"two things":                {`{"ready":{"protocol":1},"resumed":{}}` + "\n", "", "2 things"},
		"nothing in a line":         {"{}\n", "", "0 things"},
		"an array":                  {"[]\n", "", "malformed"},
		"rubbish behind":            {`{"ready":{"protocol":1}} x` + "\n", "", "malformed"},
		"another protocol":          {`{"ready":{"protocol":2}}` + "\n", "", "protocol 2"},
		"not ready":                 {`{"loaded":{}}` + "\n", "", "not ready"},
		"a line too long":           {long, "", "more than 1048576 bytes"},
		"half a line":               {`{"ready":`, "", "unexpected EOF"},
		"speaks unasked":            {readyLine + readyLine, "", "without having been asked"},
		"two answers":               {readyLine, `{"loaded":{}}` + "\n" + `{"loaded":{}}`, "without having been asked"},
		"answer to another":         {readyLine, `{"resumed":{}}`, "answer to load is none"},
		"phases are no object":      {readyLine, `{"loaded":{"phases":[1]}}`, "no object"},
		"phase is no number":        {readyLine, `{"loaded":{"phases":{"a":"b"}}}`, "phase"},
		"phase is negative":         {readyLine, `{"loaded":{"phases":{"a":-1}}}`, "-1 s"},
		"phase is for ever":         {readyLine, `{"loaded":{"phases":{"a":1e300}}}`, "1e+300 s"},
		"phase's name is a program": {readyLine, `{"loaded":{"phases":{"$(rm)":1}}}`, "not a name"},
		"too many phases":           {readyLine, `{"loaded":{"phases":{` + manyPhases(17) + `}}}`, "more than 16"},
		"failed":                    {readyLine, `{"failed":{"error":"ModuleNotFoundError: x","trace":"Traceback\n \u001b[31mred"}}`, "ModuleNotFoundError: x\nTraceback\n ?[31mred"},
		"goes when asked":           {readyLine, "-", "ended the connection"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				go func() {
					defer theirs.Close()
					if _, err := io.WriteString(theirs, c.greeting); err != nil || c.answer == "" {
						return
					}
					var question json.RawMessage
					if json.NewDecoder(theirs).Decode(&question) == nil && c.answer != "-" {
						_, _ = io.WriteString(theirs, c.answer+"\n")
					}
				}()
				l := instance.NewLoader(ours, nil)
				_, err := l.Greet(t.Context())
				synctest.Wait() // what it said unasked has been read
				if err == nil {
					_, _, err = l.Load(t.Context(), instance.LoadQuestion{})
				}
				synctest.Wait()
				if err == nil {
					err = l.Thawed(t.Context(), time.Second)
				}
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %.200v, want an error that says %q", err, c.says)
				}
				l.Close()
			})
		})
	}
}

func manyPhases(n int) string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf(`"p-%d":0`, i))
	}
	return strings.Join(list, ",")
}

// TestLoaderThatDoesNotAnswer: neither to a question, nor by reading it.
func TestLoaderThatDoesNotAnswer(t *testing.T) {
	for name, reads := range map[string]bool{"it reads": true, "it does not read": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				gone := make(chan struct{})
				go func() {
					defer close(gone)
					_, _ = io.WriteString(theirs, readyLine)
					if reads {
						_, _ = io.Copy(io.Discard, theirs)
					}
				}()
				l := instance.NewLoader(ours, nil)
				if _, err := l.Greet(t.Context()); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				begin := time.Now()
				_, _, err := l.Load(ctx, instance.LoadQuestion{})
				if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != time.Minute {
					t.Errorf("after %s: %v", time.Since(begin), err)
				}
				l.Close()
				<-gone
			})
		})
	}
}

// TestLoaderExits: what it said before its process ended is heard, and the end is heard although a child holds the connection.
func TestLoaderExits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		exited := make(chan struct{})
		l := instance.NewLoader(ours, exited)
		go func() { _, _ = io.WriteString(theirs, readyLine) }()
		if _, err := l.Greet(t.Context()); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _ = io.CopyN(io.Discard, theirs, 10)
			close(exited)
			_, _ = io.Copy(io.Discard, theirs)
		}()
		if _, _, err := l.Load(t.Context(), instance.LoadQuestion{}); err == nil || !strings.Contains(err.Error(), "ended") {
			t.Errorf("got %v", err)
		}
		l.Close()
	})
}

// TestLoadFailureIsBounded: what a caller is told of a failure is readable and not larger than it should be.
func TestLoadFailureIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		trace := "first line\n" + strings.Repeat("Ω", 200_000) + "\nlast line"
		answer, err := json.Marshal(map[string]any{"failed": map[string]string{"error": strings.Repeat("e", 100_000), "trace": trace}})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			converse(theirs, readyLine, map[string]string{"load": string(answer)})
			_ = theirs.Close()
		}()
		l := instance.NewLoader(ours, nil)
		defer l.Close()
		if _, err := l.Greet(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, _, err = l.Load(t.Context(), instance.LoadQuestion{})
		if err == nil || len(err.Error()) > 16<<10 || !strings.Contains(err.Error(), "first line\n") || !strings.HasSuffix(err.Error(), "\nlast line") {
			t.Errorf("%d bytes: %.100v", len(err.Error()), err)
		}
	})
}

// TestLargeEnvironment: what is longer than a line may be is refused before it is said.
func TestLargeEnvironment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		go func() { wellBehaved("", theirs); _ = theirs.Close() }()
		l := instance.NewLoader(ours, nil)
		defer l.Close()
		if _, err := l.Greet(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, _, err := l.Load(t.Context(), instance.LoadQuestion{Env: map[string]string{"A": strings.Repeat("\x01", 300<<10)}})
		if err == nil || !strings.Contains(err.Error(), "environment") {
			t.Errorf("got %v", err)
		}
		if err := l.Thawed(t.Context(), time.Second); err != nil {
			t.Errorf("the conversation is over: %v", err)
		}
	})
}

// FuzzLoader has a loader say anything.
func FuzzLoader(f *testing.F) {
	f.Add([]byte(readyLine + `{"loaded":{"phases":{"import":0.5}}}` + "\n" + `{"resumed":{}}` + "\n"))
	f.Add([]byte(readyLine + `{"failed":{"error":"e","trace":"t"}}` + "\n"))
	f.Add([]byte(readyLine + `{"executing":{}}` + "\n"))
	f.Add([]byte(`{"ready":{"protocol":1,"loaded":true}}`))
	f.Add([]byte(readyLine + readyLine))
	f.Add([]byte("{\"ready\":{\"protocol\":1,\"runtime\":\"\xff\x00\"}}\n{\"loaded\":{\"phases\":{\"a\":1e999}}}\n"))
	f.Add([]byte("\n\n\n"))
	f.Add([]byte(readyLine + `{"loaded":{}}` + "\n" + `{"imported":{"modules":[{"name":"numpy","seconds":0.1,"image":true},{"name":"a,b","seconds":-1}]}}` + "\n" + `{"resumed":{}}` + "\n"))
	f.Add([]byte(readyLine + `{"imported":{"modules":[]}}` + "\n"))
	f.Add([]byte(readyLine + `{"loaded":{}}` + "\n" + `{"imported":{"modules":[{"name":"\u0000","seconds":1e308},[]]}}` + "\n"))
	f.Fuzz(func(t *testing.T, said []byte) {
		synctest.Test(t, func(t *testing.T) { fuzzLoader(t, said) })
	})
}

func fuzzLoader(t *testing.T, said []byte) {
	ours, theirs := net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, theirs) }()
	go func() { _, _ = theirs.Write(said); _ = theirs.Close() }()
	l := instance.NewLoader(ours, nil)
	defer l.Close()
	ready, err := l.Greet(t.Context())
	if err != nil {
		return
	}
	if len(ready.Runtime) > 256 || len(ready.MissingLibraries()) > 32 {
		t.Errorf("greeted by %d bytes and %d libraries", len(ready.Runtime), len(ready.MissingLibraries()))
	}
	phases, executing, err := l.Load(t.Context(), instance.LoadQuestion{}, func(list []instance.ImportedModule, took time.Duration) {
		seen := map[string]bool{}
		for _, m := range list {
			if m.Name == "" || len(m.Name) > 200 || strings.ContainsAny(m.Name, ", \n\x00\x1b") || m.Seconds < 0 || seen[m.Name] {
				t.Errorf("imports %+v", m)
			}
			seen[m.Name] = true
		}
		if len(list) > 256 || took < 0 {
			t.Errorf("%d modules in %s", len(list), took)
		}
		var b instance.ImportBook
		b.Add("python", 1, "f", list, took)
		for _, m := range b.List("")[0].Modules {
			if total := m.GetTotal().AsDuration(); total < 0 || total > took {
				t.Errorf("%s took %s of %s", m.GetName(), total, took)
			}
		}
	})
	switch {
	case err != nil && len(err.Error()) > 20<<10, err != nil && (executing || phases != nil), len(phases) > 16:
		t.Errorf("%v, %v, %.100v", phases, executing, err)
	case err == nil:
		_ = l.Thawed(t.Context(), time.Second)
	}
}
