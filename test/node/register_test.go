package node_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/doctor"
	"github.com/hearth-serverless/hearth/internal/register"
	"github.com/hearth-serverless/hearth/runtimes"
)

// podNode is a node whose containerd knows nothing of Hearth, and a nodeagent that is given to it as a DaemonSet's pod is: with a mount
// namespace of its own, in which one folder is shared with the node in both directions.
type podNode struct {
	*instanceNode
	program string // nodeagent
	lib     string // /var/lib/hearth
	hosts   string
	img     v1.Image // of the function

	agent *exec.Cmd
	ended chan error
}

func newPodNode(t *testing.T) *podNode {
	t.Helper()
	toolsDir(t)
	n := &podNode{instanceNode: &instanceNode{t: t, registry: startRegistry(t), cgroup: fmt.Sprintf("/hearth-test-%d", os.Getpid())}}
	n.hosts = hostsDir(t, n.registry.Server)
	programs := t.TempDir()
	n.program = filepath.Join(programs, "nodeagent")
	buildCommand(t, "nodeagent", n.program)
	buildCommand(t, "logwriter", filepath.Join(programs, "logwriter"))
	compile(t, filepath.Join(programs, "launcher"), "../../runtimes/launcher/main.go")
	var err error
	n.img, err = mutate.AppendLayers(programImage(t, "function", functionSource), blobLayer{
		tar: tarball(t, fileEntry("late", "nobody has read this")), blob: gzipped.encode(t, tarball(t, fileEntry("late", "nobody has read this"))), media: gzipped.mediaType(),
	})
	if err != nil {
		t.Fatal(err)
	}
	n.image = n.registry.push(t, "functions/hello:1", n.img)
	pause := n.registry.push(t, "pause:1", programImage(t, "pause", string(runtimes.Pause())))
	n.containerdNode = startContainerd(t, containerdOptions{HostsDir: n.hosts, Config: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = %q
`, pause)})
	n.writeNetwork()
	t.Cleanup(n.removeCgroups)
	n.lib = filepath.Join(n.Dir, "lib")
	if err := errors.Join(os.Mkdir(n.lib, 0o755), unix.Mount(n.lib, n.lib, "", unix.MS_BIND, ""), unix.Mount("", n.lib, "", unix.MS_SHARED, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.endAgent(unix.SIGTERM) })
	return n
}

// inPod is a program in a mount namespace of its own, in which a shell has made some mounts before.
func (n *podNode) inPod(ctx context.Context, mounts string, args ...string) *exec.Cmd {
	words := append([]string{"-m", "--propagation", "unchanged", "sh", "-ec", mounts + "\n" + `exec "$0" "$@"`, n.program}, args...)
	cmd := exec.CommandContext(ctx, "unshare", words...)
	cmd.Env = append(os.Environ(), "D="+n.Dir, "HEARTH_CONTAINERD_SOCKET="+n.Socket, "HEARTH_SNAPSHOTTER_ROOT="+filepath.Join(n.lib, "snapshotter"),
		"HEARTH_SNAPSHOTTER_SOCKET="+filepath.Join(n.Dir, "s.sock"))
	return cmd
}

// once runs a command of nodeagent in a pod that sees of the node its processes and containerd's socket, and nothing else.
func (n *podNode) once(args ...string) (code int, says string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()
	socket := filepath.Join(n.t.TempDir(), "sock")
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		n.t.Fatal(err)
	}
	cmd := n.inPod(ctx, "mount --make-rprivate /; mount --bind $D/c.sock "+socket+"; mount -t tmpfs none $D; touch $D/c.sock; mount --bind "+socket+" $D/c.sock", args...)
	again := fmt.Sprintf(`kill $CONTAINERD_PID; while kill -0 $CONTAINERD_PID 2>/dev/null; do sleep 0.05; done
		PATH=%[1]s:$PATH XDG_CONFIG_HOME=%[2]s setsid %[1]s/containerd --config %[2]s/config.toml --log-level info </dev/null >>%[2]s/log 2>&1 &`, n.tools, n.Dir)
	cmd.Env = append(cmd.Env, "HEARTH_STATE="+filepath.Join(n.lib, "register"), "HEARTH_ROOT="+filepath.Join(n.lib, "node"), "HEARTH_RESTART_COMMAND="+again)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		n.t.Fatal(err)
	}
	n.t.Logf("nodeagent %s: %d\n%s", strings.Join(args, " "), cmd.ProcessState.ExitCode(), out.String())
	return cmd.ProcessState.ExitCode(), out.String()
}

func (n *podNode) must(code int, says string) string {
	n.t.Helper()
	if code != 0 {
		n.t.Fatalf("exit code %d", code)
	}
	return says
}

// startAgent starts nodeagent in a new pod, and waits until it serves.
func (n *podNode) startAgent() {
	n.t.Helper()
	socket := filepath.Join(n.Dir, "n.sock")
	n.agent = n.inPod(context.Background(), "mount --make-private /", "--name", "node-1", "--root", filepath.Join(n.lib, "node"), "--socket", socket,
		"--cgroup-parent", n.cgroup, "--hosts-dir", n.hosts, "--keep-blobs")
	log, err := os.OpenFile(filepath.Join(n.Dir, "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	n.agent.Stdout, n.agent.Stderr = log, log
	if err := n.agent.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.ended = make(chan error, 1)
	go func(cmd *exec.Cmd, ended chan<- error) { ended <- cmd.Wait() }(n.agent, n.ended)
	n.calls = hearthv1connect.NewNodeServiceClient(daemon.UnixClient(socket), "http://hearth")
	n.eventually(func() error {
		select {
		case err := <-n.ended:
			n.ended <- err
			text, _ := os.ReadFile(log.Name())
			n.t.Fatalf("nodeagent ended: %v\n%s", err, text)
		default:
		}
		stream, err := n.calls.WatchInstances(n.t.Context(), connect.NewRequest(&hearthv1.WatchInstancesRequest{}))
		if err != nil {
			return err
		}
		defer stream.Close()
		if !stream.Receive() {
			return fmt.Errorf("nodeagent does not serve: %w", stream.Err())
		}
		return nil
	})
}

// endAgent ends nodeagent, as its pod's end does, or worse.
func (n *podNode) endAgent(signal unix.Signal) {
	n.t.Helper()
	if n.agent == nil {
		return
	}
	if n.t.Failed() {
		text, _ := os.ReadFile(filepath.Join(n.Dir, "agent.log"))
		n.t.Logf("%s", text[max(0, len(text)-4000):])
	}
	_ = n.agent.Process.Signal(signal)
	select {
	case <-n.ended:
	case <-time.After(patience):
		n.t.Errorf("nodeagent does not end by %s", signal)
		_ = n.agent.Process.Kill()
		<-n.ended
	}
	n.agent = nil
}

// configuration is containerd's, file by file.
func (n *podNode) configuration() map[string]string {
	n.t.Helper()
	out := map[string]string{}
	for _, path := range []string{"config.toml", "conf.d", "conf.d/hearth.toml"} {
		info, err := os.Stat(filepath.Join(n.Dir, path))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			n.t.Fatal(err)
		}
		text, _ := os.ReadFile(filepath.Join(n.Dir, path))
		out[path] = fmt.Sprintf("%s %s\n%s", info.Mode(), info.ModTime(), text)
	}
	return out
}

// unpackedBy are the snapshotters that have an image whole.
func (n *podNode) unpackedBy(img v1.Image) (names []string) {
	n.t.Helper()
	all := chains(n.t, img)
	for _, name := range []string{"overlayfs", "hearth"} {
		if _, err := n.Client.SnapshotService(name).Stat(n.context(n.t), all[len(all)-1]); err == nil {
			names = append(names, name)
		}
	}
	return names
}

// layerMounts are the layers that the node sees mounted.
func (n *podNode) layerMounts() (points []string) {
	n.t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], filepath.Join(n.lib, "snapshotter")+"/") {
			points = append(points, f[4])
		}
	}
	return points
}

// nodeagent registers itself at a containerd that knows nothing of it, its pods come and go under the Instances, and in the end the
// node is what it was.
func TestRegister(t *testing.T) {
	n := newPodNode(t)
	before := n.configuration()

	code, says := n.once("register")
	if want := fmt.Sprintf("in %[1]s/config.toml: imports = ['%[1]s/conf.d/*.toml']", n.Dir); code != register.ExitRefused || !strings.Contains(says, want) {
		t.Errorf("exit code %d, want %d and %q", code, register.ExitRefused, want)
	}
	if diff := cmp.Diff(before, n.configuration()); diff != "" {
		t.Fatalf("refused, and yet\n%s", diff)
	}
	if code, _ := n.once("register", "--edit-main", "--restart=false"); code != register.ExitRestart {
		t.Errorf("exit code %d without a restart, want %d", code, register.ExitRestart)
	}
	if says := n.must(n.once("register", "--edit-main")); !strings.Contains(says, "was read by containerd") || !strings.Contains(says, "is back") {
		t.Errorf("the configuration was not read by the real containerd, or that was not restarted")
	}
	if says := n.must(n.once("register", "--edit-main")); !strings.Contains(says, "no restart is needed") {
		t.Errorf("it restarts containerd again")
	}
	n.wantHealthy()

	n.startAgent()
	n.create("i-1")
	first := n.activate("i-1")
	if by := n.unpackedBy(n.img); len(by) != 1 || by[0] != "hearth" {
		t.Errorf("the function's image was unpacked by %v", by)
	}
	n.wantOthersUnchanged()
	mounted := n.layerMounts()
	if len(mounted) == 0 {
		t.Error("the node sees no layer of nodeagent's pod") // so this machine has EROFS from files, as all of these tests' do
	}

	n.endAgent(unix.SIGKILL)
	if got := n.get(first.Instance.Address, "/file?name=/late"); got != "nobody has read this" {
		t.Errorf("with nodeagent killed the function reads %q", got)
	}
	n.startAgent()
	if states := n.states(); states["i-1"] != hearthv1.State_STATE_SERVING {
		t.Fatalf("after a restart: %v", states)
	}
	n.create("i-2")
	second := n.activate("i-2")
	n.endAgent(unix.SIGTERM)
	for _, answer := range []*hearthv1.ActivateResponse{first, second} {
		if got := n.get(answer.Instance.Address, "/"); got != "hello" {
			t.Errorf("with nodeagent ended the function answers %q", got)
		}
	}
	if diff := cmp.Diff(mounted, n.layerMounts()); diff != "" {
		t.Errorf("an end of nodeagent changes what is mounted:\n%s", diff)
	}
	n.startAgent()
	if states := n.states(); states["i-1"] != hearthv1.State_STATE_SERVING || states["i-2"] != hearthv1.State_STATE_SERVING {
		t.Errorf("after an upgrade: %v", states)
	}
	n.discard("i-1", "i-2")
	n.endAgent(unix.SIGTERM)

	n.must(n.once("unregister", "--purge"))
	if diff := cmp.Diff(before, n.configuration()); diff != "" {
		t.Error(diff)
	}
	if left := n.layerMounts(); len(left) > 0 {
		t.Errorf("mounts are left: %v", left)
	}
	for _, dir := range []string{"snapshotter", "node", "register"} {
		if _, err := os.Stat(filepath.Join(n.lib, dir)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the folder %s is left: %v", dir, err)
		}
	}
	if c := doctor.AskContainerd(t.Context(), n.Socket, "hearth"); c.Err != nil || c.Exports != nil {
		t.Errorf("after unregister: %+v", c)
	}

	n.must(n.once("register", "--edit-main")) // and all over again, with an image of which containerd remembers something
	n.startAgent()
	n.create("i-3")
	if got := n.get(n.activate("i-3").Instance.Address, "/"); got != "hello" {
		t.Errorf("registered again, the function answers %q", got)
	}
	n.discard("i-3")
}

// wantHealthy looks at the node with the doctor's eyes.
func (n *podNode) wantHealthy() {
	n.t.Helper()
	config, err := doctor.Load(filepath.Join(n.Dir, "config.toml"))
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range doctor.Diagnose(config, nil, "hearth") {
		if f.Status == doctor.Problem {
			n.t.Errorf("%+v", f)
		}
	}
}

// wantOthersUnchanged pulls and unpacks what is no function's as containerd did before.
func (n *podNode) wantOthersUnchanged() {
	n.t.Helper()
	other := imageOf(n.t, gzipped, tarball(n.t, fileEntry("x", "y")))
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	if _, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: n.registry.push(n.t, "other:1", other)}}); err != nil {
		n.t.Fatal(err)
	}
	if by := n.unpackedBy(other); len(by) != 1 || by[0] != "overlayfs" {
		n.t.Errorf("an image of somebody else was unpacked by %v", by)
	}
	// A pod of the function's image: the kubelet finds the image, and containerd has to unpack it from its blobs.
	img, err := n.Client.GetImage(n.context(n.t), n.image)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := containerd.NewImage(n.Client, img.Metadata()).Unpack(n.context(n.t), "overlayfs"); err != nil {
		n.t.Errorf("a pod of the function's image would not start: %v", err)
	}
}
