package node_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// loaderSource is a loader of docs/RUNTIMES.md whose handlers are the ways to behave.
const loaderSource = `package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

type question struct {
	Load *struct {
		Code, Handler, Signature, Address string
		Env map[string]string
		Seed []byte
	}
	Thawed *struct { Frozen float64; Seed []byte }
}

var loaded, thawed string

func main() {
	control, err := syscall.Dup(0)
	if err != nil {
		panic(err)
	}
	syscall.CloseOnExec(control)
	null, err := os.Open("/dev/null")
	if err != nil {
		panic(err)
	}
	if err := syscall.Dup3(int(null.Fd()), 0, 0); err != nil {
		panic(err)
	}
	listener, err := net.FileListener(os.NewFile(uintptr(control), "control"))
	if err != nil {
		panic(err)
	}
	fmt.Println("booted with", os.Getenv("HEARTH_PRELOAD"))
	if os.Getenv("BOOT") == "fails" {
		os.Exit(4)
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		serve(conn)
	}
}

func serve(conn net.Conn) {
	say := func(what string, v any) { json.NewEncoder(conn).Encode(map[string]any{what: v}) }
	say("ready", map[string]any{"protocol": 1, "runtime": "go", "loaded": loaded != ""})
	for dec := json.NewDecoder(conn); ; {
		var q question
		if dec.Decode(&q) != nil {
			return
		}
		switch {
		case q.Thawed != nil:
			thawed = fmt.Sprint(q.Thawed.Frozen, " ", len(q.Thawed.Seed))
			say("resumed", struct{}{})
		case q.Load != nil && q.Load.Handler == "fails":
			say("failed", map[string]string{"error": "NoSuchHandler: fails", "trace": "in " + q.Load.Code})
			os.Exit(1)
		case q.Load != nil && q.Load.Handler == "exits":
			fmt.Println("last words")
			os.Exit(3)
		case q.Load != nil && q.Load.Handler == "executes":
			say("executing", struct{}{})
			for k, v := range q.Load.Env {
				os.Setenv(k, v)
			}
			program, err := exec.LookPath(q.Load.Code + "/program")
			if err != nil {
				panic(err)
			}
			panic(syscall.Exec(program, []string{program}, os.Environ()))
		case q.Load != nil:
			begin := time.Now()
			for k, v := range q.Load.Env {
				os.Setenv(k, v)
			}
			os.Chdir(q.Load.Code)
			l, err := net.Listen("tcp", q.Load.Address)
			if err != nil {
				panic(err)
			}
			loaded = q.Load.Handler
			fmt.Println("loaded", loaded)
			go http.Serve(l, nil)
			say("loaded", map[string]any{"phases": map[string]float64{"listen": time.Since(begin).Seconds()}})
		}
	}
}

func init() {
	http.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, os.Getenv(r.URL.Query().Get("name"))) })
	http.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		text, err := os.ReadFile(r.URL.Query().Get("name"))
		fmt.Fprint(w, string(text))
		if err != nil {
			fmt.Fprint(w, err)
		}
	})
	http.HandleFunc("/write", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, os.WriteFile(r.URL.Query().Get("name"), []byte("x"), 0o644))
	})
	http.HandleFunc("/descriptors", func(w http.ResponseWriter, r *http.Request) {
		list, _ := os.ReadDir("/proc/self/fd")
		for _, d := range list {
			to, _ := os.Readlink("/proc/self/fd/" + d.Name())
			if !strings.HasPrefix(to, "anon_inode") {
				fmt.Fprintln(w, d.Name(), to)
			}
		}
	})
	http.HandleFunc("/log", func(w http.ResponseWriter, r *http.Request) { fmt.Println(r.URL.Query().Get("line")) })
	http.HandleFunc("/exit", func(w http.ResponseWriter, r *http.Request) { os.Exit(7) })
	http.HandleFunc("/thawed", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, thawed) })
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, loaded) })
}
`

// runtimeNode is an instanceNode with a Runtime and two tenants' code.
type runtimeNode struct {
	*instanceNode
	loader string
	code   map[string]string // package, by Function
}

func newRuntimeNode(t *testing.T) *runtimeNode {
	t.Helper()
	n := &runtimeNode{instanceNode: newInstanceNode(t), code: map[string]string{}}
	t.Cleanup(func() { // of a test that fails too: runc's state and the routes are the machine's
		for id := range n.states() {
			n.discard(id)
		}
	})
	n.loader = n.registry.push(t, "runtimes/go:1", programImage(t, "loader", loaderSource))
	for _, function := range []string{"one", "two"} {
		base := tarball(t, fileEntry("whose", function), fileEntry("lib/common", "common"))
		layers := [][]byte{base}
		if function == "two" { // an overlay, where the other is a directory
			layers = append(layers, tarball(t, fileEntry("above", "above")))
		}
		n.code[function] = n.registry.push(t, "code/"+function+":1", imageOf(t, gzipped, layers...))
	}
	n.code["program"] = n.registry.push(t, "code/program:1", programImage(t, "program", functionSource))
	return n
}

func (n *runtimeNode) runtime() *hearthv1.Runtime {
	return &hearthv1.Runtime{Name: "go", Image: n.loader, Preload: []string{"a", "b"}, Generation: 2}
}

// id makes an Instance's id the test's own: runc keeps what it knows of containers for the whole machine.
func id(name string) string { return fmt.Sprintf("%s-%d", name, os.Getpid()) }

// of is a Revision of a Function with this handler.
func (n *runtimeNode) of(function, handler string) *hearthv1.Revision {
	return &hearthv1.Revision{
		Name: function + "-00001", Function: function, Port: 8080, Env: map[string]string{"WHO": function}, Runtime: n.runtime(),
		Code:      &hearthv1.Code{Package: n.code[function], Handler: handler},
		Secrets:   map[string][]byte{"key": []byte("secret of " + function)},
		Resources: &hearthv1.Resources{MemoryBytes: 256 << 20, CpuMillis: 500},
	}
}

func (n *runtimeNode) tryBoot(name string, rt *hearthv1.Runtime) error {
	_, err := n.calls.CreateInstance(context.Background(), connect.NewRequest(&hearthv1.CreateInstanceRequest{
		Id: id(name), Degree: hearthv1.Degree_DEGREE_RUNTIME, Runtime: rt,
	}))
	return err
}

func (n *runtimeNode) boot(names ...string) {
	n.t.Helper()
	for _, name := range names {
		if err := n.tryBoot(name, n.runtime()); err != nil {
			n.t.Fatal(err)
		}
	}
}

func (n *runtimeNode) load(name string, r *hearthv1.Revision) string {
	n.t.Helper()
	answer, err := n.tryActivate(id(name), "claim-"+name, r, 30*time.Second)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Logf("%s:%s", name, describe(answer.Phases))
	return answer.Instance.Address
}

func (n *runtimeNode) prepare(functions ...string) {
	n.t.Helper()
	for _, function := range functions {
		_, err := n.calls.PrepareRevision(n.t.Context(), connect.NewRequest(&hearthv1.PrepareRevisionRequest{Revision: n.of(function, "main")}))
		if err != nil {
			n.t.Fatal(err)
		}
	}
}

// logs are a Function's, or a Runtime's.
func (n *runtimeNode) logs(function string) string {
	n.t.Helper()
	stream, err := n.calls.Logs(context.Background(), connect.NewRequest(&hearthv1.LogsRequest{Function: function}))
	if err != nil {
		n.t.Fatal(err)
	}
	defer stream.Close()
	var b strings.Builder
	for stream.Receive() {
		fmt.Fprintf(&b, "%s %s\n", stream.Msg().InstanceId, stream.Msg().Line)
	}
	return b.String()
}

// TestRuntimes has two tenants' Functions in Instances of one Runtime: one of each from a booted one, and one cold.
func TestRuntimes(t *testing.T) {
	n := newRuntimeNode(t)
	n.boot("a", "b", "x")
	n.create(id("cold"))
	n.prepare("one", "two", "program")
	one, two, cold := n.load("a", n.of("one", "main")), n.load("b", n.of("two", "main")), n.load("cold", n.of("one", "main"))
	for address, function := range map[string]string{one: "one", two: "two", cold: "one"} {
		for path, want := range map[string]string{
			"/": "main", "/env?name=WHO": function, "/env?name=PORT": "8080", "/env?name=HEARTH_PRELOAD": "a,b",
			"/file?name=/workspace/whose": function, "/file?name=whose": function, "/file?name=lib/common": "common",
			"/file?name=/run/secrets/key":                            "secret of " + function,
			"/write?name=/workspace/new":                             "open /workspace/new: read-only file system",
			"/write?name=/run/secrets/n":                             "open /run/secrets/n: read-only file system",
			"/file?name=/control/launch.sock":                        "open /control/launch.sock: no such file or directory",
			"/file?name=/sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n",
		} {
			if got := n.get(address, path); got != want {
				t.Errorf("%s: GET %s: %q, want %q", function, path, got, want)
			}
		}
		wantConfined(t, n.get(address, "/file?name=/proc/self/status"))
		n.wantReadOnly(address)
		if fds := n.get(address, "/descriptors"); !strings.Contains(fds, "0 /dev/null\n") || strings.Count(fds, "socket:") > 5 { // control and its copy, connection, listener, request
			t.Errorf("its descriptors are\n%s", fds)
		}
	}
	if got := n.get(two, "/file?name=/workspace/above"); got != "above" {
		t.Errorf("the upper layer has %q", got)
	}
	program := n.load("x", n.of("program", "executes"))
	if got := n.get(program, "/"); got != "hello" {
		t.Errorf("the program says %q", got)
	}
	wantConfined(t, n.get(program, "/file?name=/proc/self/status"))
	n.get(one, "/log?line=from+one")
	n.eventually(func() error {
		one, booted := n.logs("one"), n.logs("runtime.go")
		if !strings.Contains(one, id("a")+" loaded main\n"+id("a")+" from one\n") || strings.Contains(one, id("a")+" booted") {
			return fmt.Errorf("the Function's log is %q", one)
		}
		if !strings.Contains(booted, id("a")+" booted with a,b\n") || strings.Contains(booted, "from one") {
			return fmt.Errorf("the Runtime's log is %q", booted)
		}
		return nil
	})
	n.wantNoSecrets()
	n.discard(id("a"), id("b"), id("x"), id("cold"))
	if err := n.leftBehind(); err != nil {
		t.Error(err)
	}
}

// wantNoSecrets looks for a secret wherever something is kept: files of the node, and what containerd knows.
func (n *runtimeNode) wantNoSecrets() {
	n.t.Helper()
	err := filepath.Walk(n.Dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || !info.Mode().IsRegular() || info.Size() > 64<<20 {
			return nil
		}
		text, _ := os.ReadFile(path)
		if strings.Contains(string(text), "secret of one") {
			n.t.Errorf("%s has a secret", path)
		}
		return nil
	})
	if err != nil {
		n.t.Error(err)
	}
}

func TestRuntimesThatFail(t *testing.T) {
	n := newRuntimeNode(t)
	rt := n.runtime()
	rt.Env = map[string]string{"BOOT": "fails"}
	if err := n.tryBoot("a", rt); connect.CodeOf(err) != connect.CodeInternal || !strings.Contains(err.Error(), "status 4") || !strings.Contains(err.Error(), "booted with a,b") {
		t.Errorf("a boot that fails: %v", err)
	}
	n.boot("c", "d", "e")
	for name, c := range map[string]struct {
		handler string
		says    []string
	}{
		"c": {"fails", []string{"NoSuchHandler: fails\nin /workspace"}},
		"d": {"exits", []string{"status 3", "last words"}},
	} {
		_, err := n.tryActivate(id(name), "c-"+name, n.of("one", c.handler), 30*time.Second)
		for _, want := range c.says {
			if connect.CodeOf(err) != connect.CodeInternal || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v does not say %q", c.handler, err, want)
			}
		}
	}
	if _, err := n.tryActivate(id("e"), "c-e", n.revision(), 30*time.Second); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("an image in a Runtime: %v", err)
	}
	address := n.load("e", n.of("two", "main"))
	if r, err := http.Get("http://" + address + "/exit"); err == nil {
		r.Body.Close()
	}
	n.eventually(func() error {
		if got := n.states(); len(got) > 0 {
			return fmt.Errorf("states are %v", got)
		}
		return nil
	})
	n.eventually(n.leftBehind)
}

// TestRuntimeEngineRestart ends the engine with booted Instances, one of which serves, and starts another.
func TestRuntimeEngineRestart(t *testing.T) {
	n := newRuntimeNode(t)
	n.boot("warm", "serving")
	n.prepare("one")
	address := n.load("serving", n.of("one", "main"))
	n.eventually(func() error { // the record comes after the answer
		c, err := n.Client.LoadContainer(n.context(t), id("serving")+".fn")
		if err != nil {
			return err
		}
		labels, err := c.Labels(n.context(t))
		if err == nil && labels["hearth.dev/claim"] == "" {
			err = errors.New("it is not recorded")
		}
		return err
	})
	n.stop()
	if got := n.get(address, "/"); got != "main" {
		t.Errorf("without an engine: %q", got)
	}
	n.startEngine()
	n.eventually(func() error {
		got := n.states()
		if len(got) != 2 || got[id("warm")] != hearthv1.State_STATE_WARM || got[id("serving")] != hearthv1.State_STATE_SERVING {
			return fmt.Errorf("states are %v", got)
		}
		return nil
	})
	if got := n.get(address, "/file?name=/workspace/whose"); got != "one" {
		t.Errorf("after the restart its code is %q", got)
	}
	if again := n.load("serving", n.of("one", "main")); again != address {
		t.Errorf("the claim's repetition: %s, want %s", again, address)
	}
	if got := n.get(n.load("warm", n.of("two", "main")), "/file?name=/run/secrets/key"); got != "secret of two" {
		t.Errorf("the adopted one: %q", got)
	}
	n.discard(id("warm"), id("serving"))
	n.eventually(n.leftBehind)
}
