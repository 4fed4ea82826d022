package node_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/instance"
	"github.com/hearth-serverless/hearth/internal/bpf"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/layer"
	"github.com/hearth-serverless/hearth/registry"
	"github.com/hearth-serverless/hearth/runtimes"
	"github.com/hearth-serverless/hearth/snapshotter"
)

// functionSource is a function that can misbehave, as its argument says.
const functionSource = `package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	mode := strings.Join(os.Args[1:], " ")
	host := ""
	switch mode {
	case "exit":
		for n := range 30 {
			fmt.Println("line", n)
		}
		os.Exit(3)
	case "sleep":
		time.Sleep(time.Hour)
	case "loopback":
		host = "127.0.0.1"
	case "ignore":
		signal.Ignore(syscall.SIGTERM)
	}
	l, err := net.Listen("tcp", host+":"+os.Getenv("PORT"))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("listening on", os.Getenv("PORT"))
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
	http.HandleFunc("/log", func(w http.ResponseWriter, r *http.Request) { fmt.Println(r.URL.Query().Get("line")) })
	http.HandleFunc("/fork", func(w http.ResponseWriter, r *http.Request) {
		for {
			_, err := syscall.ForkExec("/proc/self/exe", []string{"function", "sleep"}, &syscall.ProcAttr{})
			if err != nil {
				fmt.Fprint(w, err)
				return
			}
		}
	})
	http.HandleFunc("/hog", func(w http.ResponseWriter, r *http.Request) {
		for hoard := [][]byte{}; ; {
			block := make([]byte, 1<<20)
			for n := range block {
				block[n] = 1
			}
			hoard = append(hoard, block)
		}
	})
	http.HandleFunc("/fill", func(w http.ResponseWriter, r *http.Request) {
		f, err := os.Create(r.URL.Query().Get("name"))
		written := 0
		for block := make([]byte, 1<<16); err == nil; {
			var n int
			n, err = f.Write(block)
			written += n
		}
		fmt.Fprint(w, written>>20, " MiB, ", err)
	})
	http.HandleFunc("/files", func(w http.ResponseWriter, r *http.Request) {
		for n := range 4 << 20 {
			f, err := os.Create(fmt.Sprint(r.URL.Query().Get("dir"), "/", n))
			if err != nil {
				fmt.Fprint(w, n, err)
				return
			}
			f.Close()
		}
		fmt.Fprint(w, "all")
	})
	http.HandleFunc("/exit", func(w http.ResponseWriter, r *http.Request) { os.Exit(7) })
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello") })
	panic(http.Serve(l, nil))
}
`

// subnet is the one of the Instances; the tests of this package do not run in parallel, but other runs of it may.
func subnet() string { return fmt.Sprintf("10.213.%d.0/24", os.Getpid()%256) }

// instanceNode is a containerd with our snapshotter, a registry, a network, and the engine.
type instanceNode struct {
	*containerdNode
	t         *testing.T
	log       *slog.Logger
	registry  *testRegistry
	snapshots *snapshotter.Snapshotter
	image     string // of the function
	launcher  string // program
	sidecar   string // likewise; empty is none
	pause     string // image of the sandboxes
	kubelet   string // namespace of the Pods that a kubelet makes; empty: the engine makes sandboxes
	cgroup    string
	netns     map[string]bool     // those that were there before
	prefetch  instance.Prefetcher // nil: nobody learns
	strayAge  time.Duration       // of network namespaces that are nobody's; 0 is the engine's
	layers    string              // folder of the snapshotter's layers

	engine *instance.Engine
	calls  hearthv1connect.NodeServiceClient
	stop   func()
}

func newInstanceNode(t *testing.T) *instanceNode {
	t.Helper()
	return newNodeOf(t, startRegistry(t), nil)
}

// newNodeOf is newInstanceNode with a registry that others use too. What knows profiles comes from know, unless nil, which can set
// n.prefetch.
func newNodeOf(t *testing.T, images *testRegistry, know func(n *instanceNode, c *registry.Client) snapshotter.Profiles) *instanceNode {
	t.Helper()
	toolsDir(t)
	n := &instanceNode{t: t, registry: images, cgroup: fmt.Sprintf("/hearth-test-%d", os.Getpid())}
	n.log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	hosts := hostsDir(t, n.registry.Server)
	client, err := registry.New(registry.Config{HostsDir: hosts})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	unpacker, err := layer.New(layer.Config{})
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	n.layers = filepath.Join(root, "layers")
	cfg := snapshotter.Config{Root: root, Registry: client, Layers: unpacker, Logger: n.log}
	if know != nil {
		cfg.Profiles = know(n, client)
	}
	n.snapshots, err = snapshotter.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.snapshots.Close(); err != nil {
			t.Error(err)
		}
		unmountBelow(t, root)
	})
	n.launcher = filepath.Join(t.TempDir(), "launcher")
	compile(t, n.launcher, "../../runtimes/launcher/main.go")
	buildCommand(t, "logwriter", filepath.Join(filepath.Dir(n.launcher), "logwriter"))
	n.image = n.registry.push(t, "functions/hello:1", programImage(t, "function", functionSource))
	n.pause = n.registry.push(t, "pause:1", programImage(t, "pause", string(runtimes.Pause())))
	n.containerdNode = startContainerd(t, containerdOptions{Snapshotter: n.snapshots, HostsDir: hosts, Config: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = %q
`, n.pause)})
	n.writeNetwork()
	t.Cleanup(n.removeCgroups)
	n.startEngine()
	t.Cleanup(func() { n.stop() })
	return n
}

// writeNetwork gives Instances addresses that only this host reaches.
func (n *instanceNode) writeNetwork() {
	n.t.Helper()
	if err := os.MkdirAll(filepath.Join(n.Dir, "cni"), 0o755); err != nil {
		n.t.Fatal(err)
	}
	text := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "hearth-test", "plugins": [{"type": "ptp", "ipMasq": false,
		"ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`,
		filepath.Join(n.Dir, "ipam"), subnet())
	if err := os.WriteFile(filepath.Join(n.Dir, "cni", "10-ptp.conflist"), []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// startEngine runs an engine as nodeagent does, and waits until it is ready.
func (n *instanceNode) startEngine() {
	n.t.Helper()
	listens, err := bpf.NewListenWatcher(n.log)
	if err != nil {
		n.t.Fatal(err)
	}
	networks := n.networkDir()
	if n.kubelet != "" { // it would be everybody's
		networks = ""
	}
	n.engine, err = instance.New(instance.Config{
		Node: "node-1", Root: filepath.Join(n.Dir, "node"), Address: n.Socket, CgroupParent: n.cgroup,
		Launcher: n.launcher, Sidecar: n.sidecar, Kubelet: n.kubelet, NetworkDir: networks, NetworkAge: n.strayAge, Listens: listens, Logger: n.log,
		Prefetch: n.prefetch,
	})
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	_, handler := hearthv1connect.NewNodeServiceHandler(n.engine)
	engine, socket := n.engine, filepath.Join(n.Dir, "n.sock")
	for _, run := range []func() error{
		func() error { return engine.Run(ctx) },
		func() error { return listens.Run(ctx) },
		func() error { return daemon.ServeUnix(ctx, socket, handler) },
	} {
		all.Go(func() {
			if err := run(); err != nil {
				n.t.Error(err)
			}
		})
	}
	n.stop = func() { cancel(); all.Wait() }
	n.calls = hearthv1connect.NewNodeServiceClient(daemon.UnixClient(socket), "http://hearth")
	n.eventually(func() error { return engine.Ready(ctx) })
}

// networkDir is the CRI's folder of network namespaces.
func (n *instanceNode) networkDir() string {
	return filepath.Join(n.Dir, "state", "io.containerd.grpc.v1.cri", "netns")
}

// patience is for what another process does, on whatever machine.
const patience = 2 * time.Minute

// eventually waits for what another process brings about.
func (n *instanceNode) eventually(condition func() error) {
	n.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			n.t.Fatalf("within %s: %v", patience, err)
		}
	}
}

// cgroups are the directories of Instances, in all hierarchies.
func (n *instanceNode) cgroups() []string {
	var all []string
	for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} {
		found, _ := filepath.Glob(pattern + n.cgroup + "/*")
		for _, dir := range found {
			if info, err := os.Stat(dir); err == nil && info.IsDir() {
				all = append(all, dir)
			}
		}
	}
	return all
}

// removeCgroups ends what a test that failed has left running, and removes the Instances' cgroups.
func (n *instanceNode) removeCgroups() {
	for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} {
		found, _ := filepath.Glob(pattern + n.cgroup + "/*/*")
		for _, dir := range found {
			_ = os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("THAWED"), 0) // whichever there is
			_ = os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("0"), 0)
			text, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			for _, field := range strings.Fields(string(text)) {
				if pid, err := strconv.Atoi(field); err == nil {
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			}
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} {
		for _, tail := range []string{"/*/*", "/*", ""} {
			found, _ := filepath.Glob(pattern + n.cgroup + tail)
			for _, dir := range found {
				_ = os.Remove(dir)
			}
		}
	}
}

// leftBehind tells what there is of Instances, past the engine.
func (n *instanceNode) leftBehind() error {
	n.t.Helper()
	var left []string
	ctx := n.context(n.t)
	containers, err := n.Client.Containers(ctx)
	if err != nil {
		return err
	}
	for _, c := range containers {
		left = append(left, "container "+c.ID())
	}
	for _, pid := range processesOf(n.Dir) {
		if line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); strings.Contains(string(line), "shim") {
			left = append(left, "shim "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	for _, dir := range n.cgroups() {
		left = append(left, "cgroup "+dir)
	}
	netns, _ := filepath.Glob(filepath.Join(n.Dir, "state", "*", "netns", "*"))
	left = append(left, netns...)
	files, _ := filepath.Glob(filepath.Join(n.Dir, "node", "instances", "*"))
	left = append(left, files...)
	leases, _ := filepath.Glob(filepath.Join(n.Dir, "ipam", "hearth-test", "10.*"))
	left = append(left, leases...)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[1], n.Dir+"/state/io.containerd.runtime") || strings.Contains(f[1], "/netns/") && strings.HasPrefix(f[1], n.Dir) {
			left = append(left, "mount "+f[1])
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, ", "))
	}
	return nil
}
