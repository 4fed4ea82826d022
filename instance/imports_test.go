package instance_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
)

// telling is a loader that tells a list of imports a while after it has loaded.
func telling(list string) func(string, net.Conn) {
	return func(_ string, conn net.Conn) {
		dec := json.NewDecoder(conn)
		_, _ = io.WriteString(conn, readyLine)
		for {
			var question map[string]struct{ Imports bool }
			if dec.Decode(&question) != nil {
				return
			}
			if _, thawed := question["thawed"]; thawed {
				_, _ = io.WriteString(conn, `{"resumed":{}}`+"\n")
				continue
			}
			if !question["load"].Imports {
				return // it is not asked to tell
			}
			time.Sleep(time.Second)
			_, _ = io.WriteString(conn, `{"loaded":{}}`+"\n")
			time.Sleep(time.Second)
			_, _ = io.WriteString(conn, `{"imported":{"modules":`+list+`}}`+"\n")
		}
	}
}

func listImports(t *testing.T, e *instance.Engine, runtime string) []*hearthv1.RuntimeImports {
	t.Helper()
	r, err := e.ListImports(t.Context(), connect.NewRequest(&hearthv1.ListImportsRequest{Runtime: runtime}))
	if err != nil {
		t.Fatal(err)
	}
	return r.Msg.GetRuntimes()
}

func TestImportsAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.loader = telling(`[{"name":"numpy","seconds":0.25,"image":true},{"name":"boto3","seconds":7,"image":false},{"name":"a b","seconds":1},{"name":"numpy","seconds":1}]`)
		e, stop := runUntil(t, f)
		defer stop()
		for _, id := range []string{"a", "b"} {
			warm, err := boot(e, id)
			if err != nil {
				t.Fatal(err)
			}
			if warm.Language != "python 3.11" {
				t.Errorf("its language is %q", warm.Language)
			}
			if _, err := load(e, id, inPython(3)); err != nil {
				t.Fatal(err)
			}
			if n := len(listImports(t, e, "python")); id == "a" && n != 0 {
				t.Errorf("%d Runtimes before anything was told", n)
			}
			time.Sleep(2 * time.Second)
		}
		want := []*hearthv1.RuntimeImports{{Runtime: "python", Generation: 3, Starts: 2, Functions: []string{"hello"}, Modules: []*hearthv1.ModuleImports{
			{Name: "boto3", Starts: 2, Functions: []string{"hello"}, Total: durationpb.New(2 * time.Second)}, // no longer than the loads
			{Name: "numpy", InImage: true, Starts: 2, Functions: []string{"hello"}, Total: durationpb.New(time.Second / 2)},
		}}}
		if diff := cmp.Diff(want, listImports(t, e, ""), protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		if got := listImports(t, e, "node"); len(got) != 0 {
			t.Errorf("of node: %v", got)
		}
		if _, err := freeze(e, "a", 1); err != nil { // the conversation goes on
			t.Fatal(err)
		}
		if _, err := claim(e, "a", "again", inPython(3)); err != nil {
			t.Error(err)
		}
	})
}

// TestImportsOutOfTurn: a loader that tells without having been asked, or twice, is done with.
func TestImportsOutOfTurn(t *testing.T) {
	const list = `{"imported":{"modules":[]}}` + "\n"
	for name, said := range map[string]string{
		"before it is asked": readyLine + list, "before it has loaded": readyLine + "?" + list, "twice": readyLine + `?{"loaded":{}}` + "\n" + list + list,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				go func() {
					before, after, _ := strings.Cut(said, "?")
					_, _ = io.WriteString(theirs, before)
					if after != "" {
						_ = json.NewDecoder(theirs).Decode(new(json.RawMessage))
						_, _ = io.WriteString(theirs, after)
					}
				}()
				l := instance.NewLoader(ours, nil)
				if _, err := l.Greet(t.Context()); err != nil {
					t.Fatal(err)
				}
				_, _, _ = l.Load(t.Context(), instance.LoadQuestion{})
				synctest.Wait()
				if err := l.Gone(); err == nil || !strings.Contains(err.Error(), "imports") {
					t.Errorf("the conversation has ended with %v", err)
				}
				l.Close()
			})
		})
	}
}

// TestImportBookIsBounded has one Function tell of ever new modules.
func TestImportBookIsBounded(t *testing.T) {
	var b instance.ImportBook
	for n := range 300 {
		b.Add("python", 1, fmt.Sprintf("f%d", n), []instance.ImportedModule{{Name: "json", Seconds: 0.001, Image: true}}, time.Second)
	}
	for start := range 20 {
		var list []instance.ImportedModule
		for n := range 256 {
			list = append(list, instance.ImportedModule{Name: fmt.Sprintf("m%d_%d", start, n), Seconds: 1, Image: true})
		}
		b.Add("python", 1, "hostile", list, time.Second)
	}
	r := b.List("python")[0]
	if len(r.Modules) != 2048 || len(r.Functions) != 256 || r.Starts != 320 {
		t.Errorf("%d modules, %d functions, %d starts", len(r.Modules), len(r.Functions), r.Starts)
	}
	n := slices.IndexFunc(r.Modules, func(m *hearthv1.ModuleImports) bool { return m.Name == "json" })
	if n < 0 || r.Modules[n].Starts != 300 || len(r.Modules[n].Functions) != 256 {
		t.Errorf("what 300 functions need is forgotten, or miscounted: %d", n)
	}
	b.Add("python", 2, "hello", nil, time.Second)
	b.Add("python", 1, "old", nil, time.Second)
	if r := b.List("python")[0]; r.Generation != 2 || r.Starts != 1 || len(r.Modules) != 0 {
		t.Errorf("after a change of the Runtime: %v", r)
	}
	for n := range 100 {
		b.Add(fmt.Sprintf("runtime%d", n), 1, "hello", nil, time.Second)
	}
	if all := b.List(""); len(all) != 64 || !slices.ContainsFunc(all, func(r *hearthv1.RuntimeImports) bool { return r.Runtime == "runtime99" }) {
		t.Errorf("%d Runtimes", len(all))
	}
}
