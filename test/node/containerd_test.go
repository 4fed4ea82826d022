package node_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/snapshotter"
)

// containerdOptions says what kind of containerd a test wants. The zero value is containerd as it comes.
type containerdOptions struct {
	// Snapshotter is served to containerd as the proxy plugin "hearth", which CRI then uses. Nil: overlayfs.
	Snapshotter *snapshotter.Snapshotter
	// LocalPull makes CRI pull by its older path instead of the Transfer service.
	LocalPull bool
	// HostsDir is a certs.d directory.
	HostsDir string
	// Config is appended to config.toml.
	Config string
}

// containerdNode is a containerd of the test's own, with its own root, state and socket.
type containerdNode struct {
	Dir    string // short, since Unix sockets live in it
	Socket string
	Client *containerd.Client
	Images cri.ImageServiceClient
	Pods   cri.RuntimeServiceClient

	tools  string
	cmd    *exec.Cmd
	exited chan error
	conn   *grpc.ClientConn
}

// startContainerd starts a containerd that is gone when the test ends, with its shims and mounts.
func startContainerd(t *testing.T, opts containerdOptions) *containerdNode {
	t.Helper()
	n := &containerdNode{tools: toolsDir(t), Dir: shortDir(t)}
	n.Socket = filepath.Join(n.Dir, "c.sock")
	if opts.Snapshotter != nil {
		serveSnapshotter(t, opts.Snapshotter, filepath.Join(n.Dir, "s.sock"))
	}
	if err := os.WriteFile(filepath.Join(n.Dir, "config.toml"), []byte(n.config(opts)), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.cleanUp(t) })
	n.start(t)
	return n
}

func (n *containerdNode) config(opts containerdOptions) string {
	name, proxy := "overlayfs", ""
	if opts.Snapshotter != nil {
		name = "hearth"
		proxy = fmt.Sprintf(`
[proxy_plugins.hearth]
  type = "snapshot"
  address = %q
  [proxy_plugins.hearth.exports]
    root = %q
    enable_remote_snapshot_annotations = "true"
`, filepath.Join(n.Dir, "s.sock"), n.Dir)
	}
	return fmt.Sprintf(`version = 3
root = %[1]q
state = %[2]q
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
  address = %[3]q
[plugins.'io.containerd.cri.v1.images']
  snapshotter = %[4]q
  disable_snapshot_annotations = %[5]v
  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = %[6]q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    conf_dir = %[7]q
    bin_dirs = [%[10]q]
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      Root = %[11]q # by default all containerds of a machine share runc's, and its names
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux"
  snapshotter = %[4]q
  differ = "walking"
%[8]s%[9]s`, filepath.Join(n.Dir, "root"), filepath.Join(n.Dir, "state"), n.Socket, name, !opts.LocalPull, opts.HostsDir,
		filepath.Join(n.Dir, "cni"), proxy, opts.Config, filepath.Join(n.tools, "cni"), filepath.Join(n.Dir, "runc"))
}

// start runs containerd, the first time or again, and waits until it answers.
func (n *containerdNode) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(n.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	n.cmd = exec.Command(filepath.Join(n.tools, "containerd"), "--config", filepath.Join(n.Dir, "config.toml"), "--log-level", "info")
	n.cmd.Stdout, n.cmd.Stderr = log, log
	n.cmd.Env = append(os.Environ(), "PATH="+n.tools+":"+os.Getenv("PATH"), "XDG_CONFIG_HOME="+n.Dir)
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.exited = make(chan error, 1)
	go func(cmd *exec.Cmd, exited chan<- error) { exited <- cmd.Wait() }(n.cmd, n.exited)
	soon := backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.2, MaxDelay: 100 * time.Millisecond} // usually a second and more
	n.conn, err = grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: soon, MinConnectTimeout: 5 * time.Second}))
	if err != nil {
		t.Fatal(err)
	}
	n.Images, n.Pods = cri.NewImageServiceClient(n.conn), cri.NewRuntimeServiceClient(n.conn)
	n.Client, err = containerd.NewWithConn(n.conn, containerd.WithDefaultNamespace("k8s.io"))
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		_, err := n.Pods.Version(ctx, &cri.VersionRequest{}, grpc.WaitForReady(true))
		cancel()
		if err == nil {
			return
		}
		select {
		case exit := <-n.exited:
			n.exited <- exit
			t.Fatalf("containerd ended: %v\n%s", exit, n.lastLog())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("containerd does not answer: %v\n%s", err, n.lastLog())
		}
	}
}

// context is the test's, in the namespace of CRI.
func (n *containerdNode) context(t *testing.T) context.Context {
	return namespaces.WithNamespace(t.Context(), "k8s.io")
}

// kill ends containerd as a crash does. Its shims live on.
func (n *containerdNode) kill(t *testing.T) {
	t.Helper()
	if err := n.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	n.exited <- <-n.exited
	_ = n.conn.Close()
}

func (n *containerdNode) lastLog() string {
	data, _ := os.ReadFile(filepath.Join(n.Dir, "log"))
	lines := strings.Split(string(data), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// cleanUp ends containerd, then its shims and what runs in them, and unmounts everything below its directory.
func (n *containerdNode) cleanUp(t *testing.T) {
	if t.Failed() {
		t.Log(n.lastLog())
	}
	if n.cmd != nil && n.cmd.Process != nil {
		_ = n.cmd.Process.Signal(unix.SIGTERM)
		select {
		case <-n.exited:
		case <-time.After(10 * time.Second):
			_ = n.cmd.Process.Kill()
			<-n.exited
		}
	}
	if n.conn != nil {
		_ = n.conn.Close()
	}
	for _, pid := range processesOf(n.Dir) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	unmountBelow(t, n.Dir)
}

// processesOf finds the processes that were started with a path below dir: the shims, which are no children of ours.
func processesOf(dir string) (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if strings.Contains(string(cmdline), dir+"/") {
			pids = append(pids, pid)
		}
	}
	return pids
}

func unmountBelow(t *testing.T, dir string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Error(err)
		return
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			points = append(points, fields[4])
		}
	}
	slices.Reverse(points) // later mounts cover earlier ones
	for _, p := range points {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("unmount %s: %v", p, err)
		}
	}
}

// shortDir is a temporary directory with a path that leaves room for the name of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "hctd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// toolsDir is where `make tools` put containerd and the others.
func toolsDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("HEARTH_TOOLS")
	if dir == "" {
		dir = filepath.Join("..", "..", ".cache", "tools", "current")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 {
		t.Skip("a containerd of our own needs root")
	}
	if _, err := os.Stat(filepath.Join(dir, "containerd")); err != nil {
		t.Fatalf("%v: run make tools first, or name their directory in HEARTH_TOOLS", err)
	}
	return dir
}

// serveSnapshotter serves s on a Unix socket until the test ends.
func serveSnapshotter(t *testing.T, s *snapshotter.Snapshotter, socket string) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	snapshotter.Register(server, s)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // before it has served
			t.Error(err)
		}
	})
}

// hostsDir is a certs.d directory that says to talk plain HTTP to a test server.
func hostsDir(t *testing.T, server *httptest.Server) string {
	t.Helper()
	dir := t.TempDir()
	host := filepath.Join(dir, server.Listener.Addr().String())
	if err := os.Mkdir(host, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(host, "hosts.toml"), []byte(fmt.Sprintf("server = %q\n", server.URL)), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}
