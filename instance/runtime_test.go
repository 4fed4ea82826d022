package instance_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

func python(generation int64) *hearthv1.Runtime {
	return &hearthv1.Runtime{Name: "python", Image: "example.org/python:1", Preload: []string{"numpy", "flask"}, Generation: generation}
}

// inPython is a Revision of that Runtime.
func inPython(generation int64) *hearthv1.Revision {
	return &hearthv1.Revision{
		Name: "hello-00001", Function: "hello", Port: 8080, Env: map[string]string{"A": "b"}, Runtime: python(generation),
		Code: &hearthv1.Code{Package: "example.org/code/hello:1", Handler: "main.hello"},
	}
}

func boot(e *instance.Engine, id string) (*hearthv1.Instance, error) {
	r, err := e.CreateInstance(context.Background(), connect.NewRequest(&hearthv1.CreateInstanceRequest{
		Id: id, Degree: hearthv1.Degree_DEGREE_RUNTIME, Runtime: python(3),
	}))
	if err != nil {
		return nil, err
	}
	return r.Msg.Instance, nil
}

func load(e *instance.Engine, id string, r *hearthv1.Revision) (*hearthv1.ActivateResponse, error) {
	return claim(e, id, "claim-"+id, r)
}

func claim(e *instance.Engine, id, claim string, r *hearthv1.Revision) (*hearthv1.ActivateResponse, error) {
	answer, err := e.Activate(context.Background(), connect.NewRequest(&hearthv1.ActivateRequest{
		InstanceId: id, Revision: r,
		Claim: &hearthv1.Claim{Id: claim, Epoch: 1, Deadline: timestamppb.New(time.Now().Add(time.Minute))},
	}))
	if err != nil {
		return nil, err
	}
	return answer.Msg, nil
}

func names(phases []*hearthv1.Phase) (list []string) {
	for _, p := range phases {
		list = append(list, p.Name)
	}
	return list
}

func TestLoadInBootedRuntime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		if _, err := e.PrepareRevision(t.Context(), connect.NewRequest(&hearthv1.PrepareRevisionRequest{Revision: inPython(3)})); err != nil {
			t.Fatal(err)
		}
		warm, err := boot(e, "a")
		if err != nil || warm.State != hearthv1.State_STATE_WARM || warm.Degree != hearthv1.Degree_DEGREE_RUNTIME || warm.Runtime != "python" || warm.RuntimeGeneration != 3 {
			t.Fatalf("booted %v, %v", warm, err)
		}
		if labels := f.containers["a.fn"].Labels; labels["hearth.dev/runtime"] != "python" || labels[instance.LabelClaim] != "" {
			t.Errorf("Warm was told before it was recorded: %v", labels)
		}
		pulls := f.pulls
		r := inPython(3)
		r.Secrets = map[string][]byte{"key": []byte("hush")}
		answer, err := load(e, "a", r)
		if err != nil || answer.Instance.State != hearthv1.State_STATE_SERVING || answer.Instance.Address != "10.0.0.1:8080" {
			t.Fatalf("got %v, %v", answer, err)
		}
		if got := names(answer.Phases); !slices.Contains(got, "mount") || !slices.Contains(got, "load") || !slices.Contains(got, "load_import") || slices.Contains(got, "boot") {
			t.Errorf("phases %v", got)
		}
		if f.pulls != pulls || !slices.Equal(f.mounted["a.fn"], []string{"/workspace", "/run/secrets"}) {
			t.Errorf("%d pulls while a request waited; mounted %v", f.pulls-pulls, f.mounted["a.fn"])
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if labels := fmt.Sprint(f.containers["a.fn"].Labels); !strings.Contains(labels, "claim-a") || strings.Contains(labels, "hush") || strings.Contains(labels, "main.hello") {
			t.Errorf("recorded %s", labels)
		}
		if _, err := e.ForgetRevision(t.Context(), connect.NewRequest(&hearthv1.ForgetRevisionRequest{Revision: inPython(3), RemoveImage: true})); err != nil {
			t.Fatal(err)
		}
		if !f.images["example.org/code/hello:1"] {
			t.Error("the code of an Instance that serves was removed")
		}
		if err := discard(e, "a", 1); err != nil || f.left() != nothing {
			t.Errorf("discard: %v; left: %s", err, f.left())
		}
		r = inPython(3)
		r.Runtime = &hearthv1.Runtime{Name: "python"} // as poolmanager says it of what was deleted
		if _, err := e.ForgetRevision(t.Context(), connect.NewRequest(&hearthv1.ForgetRevisionRequest{Revision: r, RemoveImage: true})); err != nil {
			t.Fatal(err)
		}
		if f.images["example.org/code/hello:1"] || !f.images["example.org/python:1"] {
			t.Errorf("images %v: want the Runtime's alone", f.images)
		}
	})
}

// TestColdLoad: a Function with a Runtime starts in a sandbox too, code and Runtime not on the node.
func TestColdLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "a"); err != nil {
			t.Fatal(err)
		}
		answer, err := load(e, "a", inPython(9))
		if err != nil || answer.Instance.Degree != hearthv1.Degree_DEGREE_RUNTIME || answer.Instance.RuntimeGeneration != 9 {
			t.Fatalf("got %v, %v", answer, err)
		}
		if got := names(answer.Phases); !slices.Contains(got, "image") || !slices.Contains(got, "boot") || !slices.Contains(got, "load") {
			t.Errorf("phases %v", got)
		}
		if err := discard(e, "a", 1); err != nil || f.left() != nothing {
			t.Errorf("discard: %v; left: %s", err, f.left())
		}
	})
}

func TestWrongRuntimeIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, stop := runUntil(t, newFake(t))
		defer stop()
		if _, err := boot(e, "a"); err != nil {
			t.Fatal(err)
		}
		other := inPython(3)
		other.Runtime.Name = "node"
		for name, r := range map[string]*hearthv1.Revision{"image": revision(), "another runtime": other, "older": inPython(2), "newer": inPython(4)} {
			_, err := load(e, "a", r)
			wantCode(t, err, connect.CodeFailedPrecondition)
			if got := list(t, e)["a"].State; got != hearthv1.State_STATE_WARM {
				t.Fatalf("%s: it is %s", name, got)
			}
		}
		if _, err := load(e, "a", inPython(3)); err != nil {
			t.Error(err)
		}
	})
}

// TestBootsThatFail: the caller hears why, and nothing is left.
func TestBootsThatFail(t *testing.T) {
	for name, c := range map[string]struct {
		loader func(id string, conn net.Conn)
		exit   bool
		says   string
	}{
		"not ready":   {func(_ string, c net.Conn) { _, _ = io.Copy(io.Discard, c) }, false, "not ready within 1m0s"},
		"it ends":     {func(_ string, c net.Conn) {}, false, "ended the connection"},
		"it exits":    {func(_ string, c net.Conn) { _, _ = io.Copy(io.Discard, c) }, true, "status 3"},
		"no protocol": {func(_ string, c net.Conn) { converse(c, "{}\n", nil) }, false, "0 things"},
		"used":        {func(_ string, c net.Conn) { converse(c, `{"ready":{"protocol":1,"loaded":true}}`+"\n", nil) }, false, "loaded already"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.loader = c.loader
				e, stop := runUntil(t, f)
				defer stop()
				answered := make(chan error)
				go func() {
					_, err := boot(e, "a")
					answered <- err
				}()
				synctest.Wait()
				if c.exit {
					f.exits <- instance.Exit{Container: "a.fn", Status: 3}
				}
				err := <-answered
				wantCode(t, err, connect.CodeInternal)
				if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "boot runtime python") {
					t.Errorf("%v does not say %q", err, c.says)
				}
				synctest.Wait()
				if f.left() != nothing || len(list(t, e)) != 0 {
					t.Errorf("left: %s", f.left())
				}
			})
		})
	}
}

// TestLoadsThatFail: the loader's trace comes to the caller, and the Instance is used up.
func TestLoadsThatFail(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		code   connect.Code
		says   string
	}{
		"failed":    {`{"failed":{"error":"SyntaxError: x","trace":"line 7"}}`, connect.CodeInternal, "the function did not load: SyntaxError: x\nline 7"},
		"rubbish":   {`rubbish`, connect.CodeInternal, `load handler "main.hello": the loader's word is malformed`},
		"it is mum": {"", connect.CodeDeadlineExceeded, "does not answer"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.loader = func(_ string, conn net.Conn) {
					_, _ = io.WriteString(conn, readyLine)
					_, _ = conn.Read(make([]byte, 1))
					if c.answer == "" {
						_, _ = io.Copy(io.Discard, conn)
						return
					}
					go func() { _, _ = io.WriteString(conn, c.answer+"\n") }()
					_, _ = io.Copy(io.Discard, conn)
				}
				e, stop := runUntil(t, f)
				defer stop()
				if _, err := boot(e, "a"); err != nil {
					t.Fatal(err)
				}
				_, err := load(e, "a", inPython(3))
				wantCode(t, err, c.code)
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%v does not say %q", err, c.says)
				}
				synctest.Wait()
				if f.left() != nothing || len(list(t, e)) != 0 {
					t.Errorf("left: %s", f.left())
				}
			})
		})
	}
}

// TestExecutingLoader: the loader becomes the Function's process, its connection ends, and that is no end of the Instance.
func TestExecutingLoader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.loader = func(_ string, conn net.Conn) {
			_, _ = io.WriteString(conn, readyLine)
			_, _ = conn.Read(make([]byte, 64<<10))
			_, _ = io.WriteString(conn, `{"executing":{}}`+"\n")
		}
		e, stop := runUntil(t, f)
		defer stop()
		if _, err := boot(e, "a"); err != nil {
			t.Fatal(err)
		}
		answer, err := load(e, "a", inPython(3))
		if err != nil || !slices.Contains(names(answer.Phases), "process") {
			t.Fatalf("%v, %v", answer, err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := list(t, e)["a"].GetState(); got != hearthv1.State_STATE_SERVING || f.containers["a.fn"].Labels["hearth.dev/loader"] != "gone" {
			t.Errorf("it is %s, %v", got, f.containers["a.fn"].Labels)
		}
		if err := e.Thawed(t.Context(), "a", time.Hour); err != nil {
			t.Errorf("a process without a loader is told of a thaw: %v", err)
		}
	})
}

// TestLoaderDies: the end of the connection is the Instance's, at once, whatever it was doing.
func TestLoaderDies(t *testing.T) {
	for name, loads := range map[string]bool{"warm": false, "serving": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				die := make(chan struct{})
				f.loader = func(id string, conn net.Conn) {
					go func() { <-die; _ = conn.Close() }()
					wellBehaved(id, conn)
				}
				e, stop := runUntil(t, f)
				defer stop()
				if _, err := boot(e, "a"); err != nil {
					t.Fatal(err)
				}
				if loads {
					if _, err := load(e, "a", inPython(3)); err != nil {
						t.Fatal(err)
					}
				}
				begin := time.Now()
				close(die)
				synctest.Wait()
				if f.left() != nothing || len(list(t, e)) != 0 || time.Since(begin) != 0 {
					t.Errorf("left after %s: %s", time.Since(begin), f.left())
				}
			})
		})
	}
}

func TestThawedIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		if err := create(e, "image"); err != nil {
			t.Fatal(err)
		}
		if e.Thawed(t.Context(), "image", time.Second) != nil {
			t.Error("an image is told of a thaw")
		}
		if _, err := boot(e, "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := load(e, "a", inPython(3)); err != nil {
			t.Fatal(err)
		}
		if err := e.Thawed(t.Context(), "a", time.Hour); err != nil {
			t.Error(err)
		}
	})
}

// TestThawOfPromptLoader: one that takes a thaw in before any request is not waited for; what it fails to say ends the Instance all
// the same.
func TestThawOfPromptLoader(t *testing.T) {
	promptLine := strings.Replace(readyLine, "false", `false,"prompt":true`, 1)
	for name, c := range map[string]struct {
		greeting, answer string
		takes            time.Duration // the claim
		fails            bool
		ends             time.Duration // the Instance after it; 0 for never
	}{
		"prompt":               {greeting: promptLine, answer: `{"resumed":{}}`},
		"prompt, silent":       {greeting: promptLine, ends: 5 * time.Second},
		"prompt, says other":   {greeting: promptLine, answer: `{"loaded":{}}`, ends: time.Nanosecond},
		"prompt, says rubbish": {greeting: promptLine, answer: `rubbish`, ends: time.Nanosecond},
		"not prompt":           {greeting: readyLine, answer: `{"resumed":{}}`},
		"not prompt, silent":   {greeting: readyLine, takes: 5 * time.Second, fails: true, ends: time.Nanosecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.loader = func(_ string, conn net.Conn) {
					answers := map[string]string{"load": `{"loaded":{"phases":{}}}`, "thawed": c.answer}
					converse(conn, c.greeting, answers, func(question string) {
						if answers[question] == "" { // until the connection ends
							_, _ = io.Copy(io.Discard, conn)
						}
					})
				}
				e, stop := runUntil(t, f)
				defer stop()
				if _, err := boot(e, "a"); err != nil {
					t.Fatal(err)
				}
				if _, err := load(e, "a", inPython(3)); err != nil {
					t.Fatal(err)
				}
				if _, err := freeze(e, "a", 1); err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				answer, err := claim(e, "a", "another", inPython(3))
				if took := time.Since(begin); took != c.takes || (err != nil) != c.fails {
					t.Fatalf("the claim took %s: %v, %v", took, answer, err)
				}
				time.Sleep(c.ends - time.Nanosecond) // none of it is over if it is to last
				synctest.Wait()
				if list(t, e)["a"] == nil && c.ends > time.Nanosecond {
					t.Error("it ended early")
				}
				time.Sleep(time.Minute)
				if alive := list(t, e)["a"] != nil; alive != (c.ends == 0) {
					t.Errorf("it is there: %t", alive)
				}
			})
		})
	}
}

// TestRebuildRuntimes gives a new engine what a former one may have left of Instances with a Runtime.
func TestRebuildRuntimes(t *testing.T) {
	loadedLine := strings.Replace(readyLine, "false", "true", 1)
	for name, c := range map[string]struct {
		greeting     string
		marked, used bool
		want         hearthv1.State
	}{
		"waiting":                       {greeting: readyLine, want: hearthv1.State_STATE_WARM},
		"loaded":                        {greeting: loadedLine},
		"claimed, and the loader lies":  {greeting: readyLine, marked: true},
		"does not answer":               {},
		"talks rubbish":                 {greeting: "rubbish\n"},
		"serving":                       {greeting: loadedLine, marked: true, used: true, want: hearthv1.State_STATE_SERVING},
		"serving, and the loader sulks": {marked: true, used: true, want: hearthv1.State_STATE_SERVING},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				former, stop := runUntil(t, f)
				if _, err := boot(former, "a"); err != nil {
					t.Fatal(err)
				}
				if c.used {
					if _, err := load(former, "a", inPython(3)); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Second) // it is recorded
				}
				stop()
				f.loader = func(_ string, conn net.Conn) {
					converse(conn, c.greeting, map[string]string{"load": `{"loaded":{}}`, "thawed": `{"resumed":{}}`})
				}
				root := t.TempDir()
				if c.marked && !c.used {
					mark := filepath.Join(root, "instances", "a", "claimed")
					if err := errors.Join(os.MkdirAll(filepath.Dir(mark), 0o755), os.WriteFile(mark, nil, 0o600)); err != nil {
						t.Fatal(err)
					}
				}
				e, stop := runIn(t, f, root)
				defer stop()
				time.Sleep(10 * time.Second)
				synctest.Wait()
				got := list(t, e)["a"]
				if got.GetState() != c.want {
					t.Fatalf("it is %s, want %s", got.GetState(), c.want)
				}
				switch c.want {
				case hearthv1.State_STATE_UNSPECIFIED:
					if f.left() != nothing {
						t.Errorf("left: %s", f.left())
					}
					return
				case hearthv1.State_STATE_WARM:
					if _, err := load(e, "a", inPython(3)); err != nil {
						t.Error(err)
					}
				case hearthv1.State_STATE_SERVING:
					if err := e.Thawed(t.Context(), "a", time.Hour); (err == nil) != (c.greeting == loadedLine) {
						t.Errorf("thawed: %v", err)
					}
				}
				if got.Runtime != "python" || got.RuntimeGeneration != 3 || got.Degree != hearthv1.Degree_DEGREE_RUNTIME {
					t.Errorf("it is %v", got)
				}
				if err := discard(e, "a", 1); err != nil || f.left() != nothing {
					t.Errorf("discard: %v; left: %s", err, f.left())
				}
			})
		})
	}
}

// TestCodeIsShared: many Revisions and claims of one package make one view, which goes with the last of them.
func TestCodeIsShared(t *testing.T) {
	f := newFake(t)
	e := run(t, f)
	var all sync.WaitGroup
	for n := range 20 {
		all.Go(func() {
			r := inPython(3)
			r.Name = fmt.Sprintf("hello-%05d", n)
			if _, err := e.PrepareRevision(t.Context(), connect.NewRequest(&hearthv1.PrepareRevisionRequest{Revision: r})); err != nil {
				t.Error(err)
				return
			}
			id := fmt.Sprint("i-", n)
			if _, err := boot(e, id); err != nil {
				t.Error(err)
				return
			}
			if _, err := load(e, id, r); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if len(f.views) != 1 {
		t.Errorf("%d views, want 1", len(f.views))
	}
	for n := range 20 {
		all.Go(func() {
			r := inPython(3)
			r.Name = fmt.Sprintf("hello-%05d", n)
			if err := discard(e, fmt.Sprint("i-", n), 1); err != nil {
				t.Error(err)
			}
			if _, err := e.ForgetRevision(t.Context(), connect.NewRequest(&hearthv1.ForgetRevisionRequest{Revision: r, RemoveImage: true})); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if f.left() != nothing || f.images["example.org/code/hello:1"] {
		t.Errorf("left: %s, images %v", f.left(), f.images)
	}
}

// TestCodeRemovedBehindTheEngine: a package that somebody removed is fetched again.
func TestCodeRemovedBehindTheEngine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		e, stop := runUntil(t, f)
		defer stop()
		if _, err := boot(e, "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := boot(e, "b"); err != nil {
			t.Fatal(err)
		}
		if _, err := load(e, "a", inPython(3)); err != nil {
			t.Fatal(err)
		}
		if err := discard(e, "a", 1); err != nil {
			t.Fatal(err)
		}
		f.set(func() { delete(f.images, "example.org/code/hello:1") })
		if _, err := load(e, "b", inPython(3)); err != nil {
			t.Error(err)
		}
	})
}
