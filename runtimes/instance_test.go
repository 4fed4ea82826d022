package runtimes_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/runtimes"
)

// patience is how long anything may take before a test gives up; nothing is expected to take long.
const patience = 2 * time.Minute

// address is where Functions listen: each Instance has a network namespace of its own.
const address = "127.0.0.1:8080"

// trees has the unpacked image of each Runtime; the first test that wants one makes it.
var trees struct {
	sync.Mutex
	dir  string
	made map[string]func() (images.Program, error)
}

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "hearth-runtimes-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	trees.dir, trees.made = dir, map[string]func() (images.Program, error){}
	return m.Run()
}

// config is that of the images, in the checkout's cache unless HEARTH_CACHE names another.
func config() images.Config {
	cache := os.Getenv("HEARTH_CACHE")
	if cache == "" {
		cache = filepath.Join("..", ".cache")
	}
	return images.Config{Cache: cache, Progress: func(line string) { fmt.Fprintln(os.Stderr, line) }}
}

// tree returns the root file system of a Runtime's image and its program. Building, unpacking and entering it takes root, which is
// the one probe: as root nothing skips.
func tree(t testing.TB, name string) (string, images.Program) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("images, mounts and namespaces need root")
	}
	root := filepath.Join(trees.dir, name)
	trees.Lock()
	if trees.made[name] == nil {
		trees.made[name] = sync.OnceValues(func() (images.Program, error) {
			path, err := images.Build(context.Background(), config(), "runtime-"+name)
			if err != nil {
				return images.Program{}, err
			}
			if err := os.MkdirAll(filepath.Join(root, "workspace"), 0o755); err != nil {
				return images.Program{}, err
			}
			return images.Unpack(context.Background(), path, root)
		})
	}
	once := trees.made[name]
	trees.Unlock()
	program, err := once()
	if err != nil {
		t.Fatal(err)
	}
	return root, program
}

// namespace is a thread with a network namespace of its own, in which only loopback is.
type namespace struct {
	work chan func()
}

func newNamespace(t testing.TB) *namespace {
	n := &namespace{work: make(chan func())}
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = loopbackUp()
		}
		failed <- err
		for f := range n.work {
			f()
		}
	}()
	t.Cleanup(func() { close(n.work) })
	if err := <-failed; err != nil {
		t.Fatalf("network namespace: %v", err)
	}
	return n
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
}

// do runs f on the thread.
func (n *namespace) do(f func()) {
	done := make(chan struct{})
	n.work <- func() { defer close(done); f() }
	<-done
}

func (n *namespace) dial(ctx context.Context, network, to string) (conn net.Conn, err error) {
	var dialer net.Dialer
	// An address in figures is dialled by the calling goroutine, and so in its thread's namespace.
	n.do(func() { conn, err = dialer.DialContext(ctx, network, to) })
	return conn, err
}

// instance is a booted Runtime, as nodeagent has it.
type instance struct {
	process  *exec.Cmd
	ended    chan struct{}
	state    *os.ProcessState
	code     string // what it sees as /workspace
	control  string // the socket's path, for us only
	out, err *transcript
	network  *namespace
	client   *http.Client
}

// enter makes the container's file system: the image read-only, with what a container finds over it.
const enter = `root=$1 code=$2; shift 2
mount --bind "$root" "$root"; mount -o remount,bind,ro "$root"
mount --rbind /dev "$root/dev"; mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"; mount -t tmpfs tmpfs "$root/tmp"
mount --bind "$code" "$root/workspace"
exec chroot "$root" "$@"`

// boot starts the loader of a Runtime in its image.
func boot(t testing.TB, name string, env ...string) *instance {
	t.Helper()
	root, program := tree(t, name)
	dir, err := os.MkdirTemp("", "hl") // short: a socket's path is
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	i := &instance{code: t.TempDir(), control: filepath.Join(dir, "control"), out: newTranscript(), err: newTranscript(), ended: make(chan struct{}), network: newNamespace(t)}
	i.client = &http.Client{Timeout: patience, Transport: &http.Transport{
		DialContext: i.network.dial, MaxIdleConnsPerHost: 100, ExpectContinueTimeout: patience,
	}}
	if err := os.Chmod(i.code, 0o755); err != nil {
		t.Fatal(err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: i.control, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	socket, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	_ = listener.Close()
	defer socket.Close()
	if err := unix.SetNonblock(int(socket.Fd()), true); err != nil { // a loader has to take it as it comes
		t.Fatal(err)
	}
	i.process = &exec.Cmd{
		Path: "/bin/sh", Args: append([]string{"sh", "-euc", enter, "sh", root, i.code}, program.Args...), Env: append(program.Env, env...),
		Stdin: socket, Stdout: i.out, Stderr: i.err,
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
		},
	}
	i.network.do(func() { err = i.process.Start() })
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(i.ended)
		_ = i.process.Wait()
		i.state = i.process.ProcessState
	}()
	t.Cleanup(func() {
		i.client.CloseIdleConnections()
		_ = i.process.Process.Kill()
		<-i.ended
		if t.Failed() {
			t.Logf("standard output:\n%s\nstandard error:\n%s", i.out, i.err)
		}
	})
	return i
}

// conversation is one connection of nodeagent's.
type conversation struct {
	t     testing.TB
	conn  net.Conn
	lines *bufio.Reader

	prompt bool // by its greeting
}

// message is anything that a loader says.
type message struct {
	Ready *struct {
		Protocol  int
		Runtime   string
		Loaded    bool
		Prompt    bool
		Preloaded []string
		Missing   map[string]string
	}
	Loaded             *struct{ Phases map[string]float64 }
	Failed             *struct{ Error, Trace string }
	Executing, Resumed *struct{}
	Imported           *struct {
		Modules []struct {
			Name    string
			Seconds float64
			Image   bool
		}
	}
}

// connect connects and hears that the loader is ready.
func (i *instance) connect(t testing.TB) (*conversation, message) {
	t.Helper()
	c := i.dialControl(t)
	m := c.hear()
	if m.Ready == nil || m.Ready.Protocol != 1 {
		t.Fatalf("it begins with %+v, want ready in protocol 1", m)
	}
	c.prompt = m.Ready.Prompt
	return c, m
}

func (i *instance) dialControl(t testing.TB) *conversation {
	t.Helper()
	conn, err := net.Dial("unix", i.control)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &conversation{t: t, conn: conn, lines: bufio.NewReader(conn)}
}

func (c *conversation) hear() message {
	c.t.Helper()
	line, err := c.lines.ReadBytes('\n')
	if err != nil {
		c.t.Fatalf("the loader said %q, then: %v", line, err)
	}
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		c.t.Fatalf("the loader said %q: %v", line, err)
	}
	return m
}

func (c *conversation) ask(what string, v any) message {
	c.t.Helper()
	c.put(what, v)
	return c.hear()
}

// put asks and does not wait.
func (c *conversation) put(what string, v any) {
	c.t.Helper()
	line, err := json.Marshal(map[string]any{what: v, "unknown": "field"})
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		c.t.Fatal(err)
	}
}

// over waits until the loader ends the conversation; it may have said something before.
func (c *conversation) over() (said []byte) {
	c.t.Helper()
	said, err := io.ReadAll(c.lines)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		c.t.Fatalf("the connection goes on: %v", err)
	}
	return said
}

// load is what is asked to load; seeds are 32 times one byte.
func load(handler, signature string, seed byte, env map[string]string) map[string]any {
	if env == nil {
		env = map[string]string{}
	}
	env["PORT"] = "8080"
	return map[string]any{
		"code": "/workspace", "handler": handler, "signature": signature, "address": address, "env": env,
		"seed": bytes.Repeat([]byte{seed}, 32),
	}
}

// serve brings code into a booted Instance and loads it.
func (i *instance) serve(t testing.TB, l language, handler, signature string, seed byte, env map[string]string) *conversation {
	t.Helper()
	i.bring(t, l.code(t))
	c, _ := i.connect(t)
	i.loaded(t, c, c.ask("load", load(handler, signature, seed, env)))
	return c
}

// loaded checks that a Function is up.
func (i *instance) loaded(t testing.TB, c *conversation, m message) {
	t.Helper()
	switch {
	case m.Loaded != nil:
		for name, seconds := range m.Loaded.Phases {
			if seconds < 0 {
				t.Errorf("phase %s took %v s", name, seconds)
			}
		}
	case m.Executing != nil:
		if said := c.over(); len(said) > 0 {
			t.Fatalf("it was executing, then said %q", said)
		}
		i.accepting(t)
	default:
		t.Fatalf("it answers load with %+v", m.Failed)
	}
}

// accepting waits until the Function accepts connections, as nodeagent does for one that is executed.
func (i *instance) accepting(t testing.TB) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		conn, err := i.network.dial(t.Context(), "tcp", address)
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// bring puts files where the Instance sees its code.
func (i *instance) bring(t testing.TB, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(i.code, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func (i *instance) request(t testing.TB, method, path string, header map[string]string, body io.Reader) (*http.Response, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+address+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range header {
		r.Header.Set(name, value)
	}
	return i.client.Do(r)
}

// get returns a whole answer.
func (i *instance) get(t testing.TB, path string) (int, string) {
	t.Helper()
	return i.send(t, http.MethodGet, path, nil, "")
}

func (i *instance) send(t testing.TB, method, path string, header map[string]string, body string) (int, string) {
	t.Helper()
	answer, err := i.request(t, method, path, header, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(text)
}

func (i *instance) want(t testing.TB, path string, status int, body string) {
	t.Helper()
	if gotStatus, gotBody := i.get(t, path); gotStatus != status || gotBody != body {
		t.Errorf("%s: %d %q, want %d %q", path, gotStatus, gotBody, status, body)
	}
}

// wait returns the status with which the loader's process ends.
func (i *instance) wait(t testing.TB) int {
	t.Helper()
	select {
	case <-i.ended:
		return i.state.ExitCode()
	case <-time.After(patience):
		t.Fatal("the process does not end")
		return 0
	}
}

// transcript keeps what is written to it.
type transcript struct {
	mu      sync.Mutex // of what follows
	text    bytes.Buffer
	changed chan struct{}
}

func newTranscript() *transcript { return &transcript{changed: make(chan struct{})} }

func (l *transcript) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	return l.text.Write(p)
}

func (l *transcript) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// has waits until part was written.
func (l *transcript) has(t testing.TB, part string) {
	t.Helper()
	late := time.After(patience)
	for {
		l.mu.Lock()
		text, changed := l.text.String(), l.changed
		l.mu.Unlock()
		if strings.Contains(text, part) {
			return
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("it never logs %q, but:\n%s", part, text)
		}
	}
}

func TestNames(t *testing.T) {
	for _, name := range runtimes.Names() {
		if sources, ok := runtimes.Loader(name); !ok || len(sources) == 0 {
			t.Errorf("%s has no loader", name)
		}
		if _, ok := languages[name]; !ok {
			t.Errorf("%s is not tested", name)
		}
	}
	if _, ok := runtimes.Loader("cobol"); ok {
		t.Error("there is a loader of a Runtime that there is not")
	}
}
