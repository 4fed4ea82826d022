package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-serverless/hearth/bench/disk"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// podNode is a containerd as it comes, with overlayfs and its own CRI: what a kubelet would have without Hearth.
type podNode struct {
	*node
	runtime cri.RuntimeServiceClient
	cgroup  string
}

const podNodeConfig = `version = 3
root = {{json .Root}}
state = {{json .State}}
[grpc]
  address = {{json .Socket}}
[ttrpc]
  address = {{.Socket | printf "%s.ttrpc" | json}}
[plugins.'io.containerd.internal.v1.opt']
  path = {{json .Opt}}
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = {{json .Pause}}
[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE a sandbox's score cannot be lowered, and then none would start.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    runtime_path = {{json .Shim}}
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = {{json .Runc}}
      Root = {{json .RuncRoot}}
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = [{{json .CNIBin}}]
    conf_dir = {{json .CNIConf}}
[plugins.'io.containerd.shim.v1.manager']
  socket_dir = {{json .Shims}}
`

// podNetwork is Hearth's own network with other addresses: a veth for each pod and nothing that outlives it.
const podNetwork = `{"cniVersion": "1.0.0", "name": {{json .Name}}, "plugins": [{"type": "ptp", "ipam": {
  "type": "host-local", "dataDir": {{json .Leases}}, "ranges": [[{"subnet": {{json .Subnet}}}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
`

// startPodNode starts one with its data in dir, which a file system of its own holds.
func startPodNode(ctx context.Context, o *Options, dir string) (_ *podNode, err error) {
	sockets, err := os.MkdirTemp("", "cri-") // short, as their names must be
	if err != nil {
		return nil, fmt.Errorf("make a folder for sockets: %w", err)
	}
	name := filepath.Base(sockets)
	conf := filepath.Join(dir, "cni")
	if err := os.MkdirAll(conf, 0o700); err != nil {
		return nil, fmt.Errorf("make a folder for networks: %w", err)
	}
	// Addresses that are set aside for benchmarks (RFC 2544), where no one's network is.
	subnet := fmt.Sprintf("198.%d.%d.0/22", 18+rand.IntN(2), 4*rand.IntN(64))
	n := &podNode{cgroup: "/" + name, node: &node{tools: o.Tools, dir: dir, socket: filepath.Join(sockets, "c.sock"), snapshotter: "overlayfs"}}
	config := filepath.Join(dir, "cri.toml")
	err = errors.Join(
		render(config, podNodeConfig, map[string]string{
			"Root": filepath.Join(dir, "root"), "State": filepath.Join(sockets, "state"), "Opt": filepath.Join(dir, "opt"), "Socket": n.socket,
			"Pause": stack.PauseRef, "Shim": filepath.Join(o.Tools, "containerd-shim-runc-v2"), "Runc": filepath.Join(o.Tools, "runc"),
			"RuncRoot": filepath.Join(sockets, "runc"), "CNIBin": filepath.Join(o.Tools, "cni"), "CNIConf": conf, "Shims": filepath.Join(sockets, "s"),
		}),
		render(filepath.Join(conf, "10-pods.conflist"), podNetwork, map[string]string{
			"Name": name, "Leases": filepath.Join(dir, "leases"), "Subnet": subnet,
		}))
	if err != nil {
		return nil, err
	}
	p, err := startProcess(dir, nil, filepath.Join(o.Tools, "containerd"), "--config", config)
	if err != nil {
		return nil, err
	}
	n.stop = func() error {
		p.stop()
		return errors.Join(disk.Unmount(sockets), os.RemoveAll(sockets))
	}
	if err := p.await(ctx, "unix", n.socket); err != nil {
		return nil, errors.Join(err, n.stop())
	}
	if n.conn, err = grpc.NewClient("unix://"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return nil, errors.Join(fmt.Errorf("connect to containerd: %w", err), n.stop())
	}
	n.images, n.runtime = n.conn, cri.NewRuntimeServiceClient(n.conn)
	if err := n.ready(ctx); err != nil {
		return nil, errors.Join(err, n.close())
	}
	if err := n.ctr(ctx, "images", "import", filepath.Join(o.Bin, "pause.tar")); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

// end removes what pods there still are, and the node.
func (n *podNode) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	var errs []error
	list, err := n.runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	for _, p := range list.GetItems() {
		errs = append(errs, n.removePod(ctx, p.GetId()))
	}
	errs = append(errs, err, n.close())
	for _, dir := range cgroupsNamed(n.cgroup) {
		errs = append(errs, ignoreMissing(os.Remove(dir)))
	}
	return errors.Join(errs...)
}

// cgroupsNamed are the folders of a cgroup in the hierarchies that there are, of version 1 or 2.
func cgroupsNamed(path string) []string {
	out, _ := filepath.Glob("/sys/fs/cgroup/*" + path) // the pattern is well formed
	return append(out, "/sys/fs/cgroup"+path)
}

func (n *podNode) removePod(ctx context.Context, id string) error {
	_, err := n.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
	if err == nil {
		_, err = n.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
	}
	if err != nil {
		return fmt.Errorf("remove pod %s: %w", id, err)
	}
	return nil
}

// pods starts n pods of an image that is present, at once, asks each until it answers, and removes them. It returns, for each, the
// time from RunPodSandbox to the last byte of the answer.
func (n *podNode) pods(ctx context.Context, ref string, count int) ([]time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	took, errs, ids := make([]time.Duration, count), make([]error, count), make([]string, count)
	var all sync.WaitGroup
	for i := range count {
		// A client that asks for many must not take from them the cores on which they start.
		all.Go(func() { took[i], ids[i], errs[i] = n.pod(ctx, ref, time.Duration(count)*awaitPause) })
	}
	all.Wait()
	for i, id := range ids {
		if id != "" {
			errs[i] = errors.Join(errs[i], n.removePod(ctx, id))
		}
	}
	return took, errors.Join(errs...)
}

// pod starts one, with the calls that a kubelet makes.
func (n *podNode) pod(ctx context.Context, ref string, every time.Duration) (took time.Duration, id string, err error) {
	name := fmt.Sprintf("pod-%016x", rand.Uint64())
	config := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name}, Hostname: name,
		LogDirectory: filepath.Join(n.dir, "log", name), Linux: &cri.LinuxPodSandboxConfig{CgroupParent: n.cgroup},
	}
	start := time.Now()
	box, err := n.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return 0, "", fmt.Errorf("run a pod: %w", err)
	}
	id = box.GetPodSandboxId()
	status, err := n.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		return 0, id, fmt.Errorf("read the address of a pod: %w", err)
	}
	ip := status.GetStatus().GetNetwork().GetIp()
	hosts, err := n.writeHosts(name, ip)
	if err != nil {
		return 0, id, err
	}
	made, err := n.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: id, SandboxConfig: config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "function"}, Image: &cri.ImageSpec{Image: ref}, LogPath: "function.log",
		Envs: []*cri.KeyValue{{Key: "PORT", Value: []byte("8080")}}, Linux: &cri.LinuxContainerConfig{},
		Mounts: []*cri.Mount{{ContainerPath: "/etc/hosts", HostPath: hosts}},
	}})
	if err != nil {
		return 0, id, fmt.Errorf("create the container of a pod: %w", err)
	}
	if _, err := n.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.GetContainerId()}); err != nil {
		return 0, id, fmt.Errorf("start the container of a pod: %w", err)
	}
	address := ip + ":8080"
	if err := awaitListener(ctx, address, every); err != nil {
		return 0, id, err
	}
	client := newClient()
	defer client.CloseIdleConnections()
	if _, err := ask(ctx, client, "http://"+address+"/", nil); err != nil {
		return 0, id, err
	}
	return time.Since(start), id, nil
}

// writeHosts writes the /etc/hosts that a kubelet gives a pod: without its own name in it, a process that looks that up waits for a
// name server.
func (n *podNode) writeHosts(pod, ip string) (string, error) {
	path := filepath.Join(n.dir, "log", pod, "hosts")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", fmt.Errorf("hosts of a pod: %w", err)
	}
	text := "127.0.0.1\tlocalhost\n" + ip + "\t" + pod + "\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return "", fmt.Errorf("hosts of a pod: %w", err)
	}
	return path, nil
}
