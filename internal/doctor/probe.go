package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	version "github.com/containerd/containerd/api/services/version/v1"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/bpf"
	"github.com/hearth-serverless/hearth/internal/daemon"
)

// askTimeout bounds each question to a daemon.
const askTimeout = 5 * time.Second

// Places are where to look. What is empty is not looked at.
type Places struct {
	Containerd  string // socket
	Snapshotter string // socket
	Name        string // of the snapshotter
	Root        string // of the snapshotter
	Nodeagent   string // socket
	Kubelet     string // its configuration file; that there is none is no fault
}

// Probe asks the machine. What it cannot find out is said in the facts; nothing is changed.
func Probe(ctx context.Context, p Places) (*Facts, error) {
	kubelet, err := readKubelet(p.Kubelet)
	if err != nil {
		return nil, err
	}
	_, notSystemd := os.Stat("/run/systemd/system")
	f := &Facts{
		Overlay: fileSystem("overlay"), EROFS: erofsFromFile(), Mounts: mountCalls(), BPF: bpf.Supported(),
		CgroupVersion: cgroupVersion(), Systemd: notSystemd == nil, Kubelet: kubelet,
		Containerd:  AskContainerd(ctx, p.Containerd, p.Name),
		Snapshotter: askSnapshotter(ctx, p.Snapshotter),
		Nodeagent:   askNodeagent(ctx, p.Nodeagent),
	}
	if p.Root != "" {
		f.Disk = disk(p.Root)
	}
	return f, nil
}

// fileSystem says whether the kernel can mount a type; it loads the module if there is one.
func fileSystem(name string) error {
	fd, err := unix.Fsopen(name, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("the kernel does not mount %s: %w", name, err)
	}
	return unix.Close(fd)
}

// erofsFromFile tries to mount a file of zeros: a kernel that can mount files says that this one is no EROFS, others want a
// block device.
func erofsFromFile() error {
	f, err := os.CreateTemp("", "hearth-doctor")
	if err != nil {
		return fmt.Errorf("try a mount from a file: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := f.Truncate(64 << 10); err != nil {
		return fmt.Errorf("try a mount from a file: %w", err)
	}
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("the kernel does not mount erofs: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.FsconfigSetString(fd, "source", f.Name()); err != nil {
		return fmt.Errorf("try a mount from a file: %w", err)
	}
	if err := unix.FsconfigCreate(fd); errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("the kernel does not mount erofs from a file: %w", err)
	}
	return nil
}

// mountCalls says whether a mount can be made in one namespace and put into another.
func mountCalls() error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/proc", unix.OPEN_TREE_CLOEXEC|unix.OPEN_TREE_CLONE)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	// Nowhere to nowhere: only whether the call is there and allowed is of interest.
	if err := unix.MoveMount(-1, "", -1, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

func cgroupVersion() int {
	var st unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &st) != nil {
		return 0
	}
	switch st.Type {
	case unix.CGROUP2_SUPER_MAGIC:
		return 2
	case unix.TMPFS_MAGIC, unix.CGROUP_SUPER_MAGIC:
		return 1
	}
	return 0
}

func connectTo(socket string) (*grpc.ClientConn, error) {
	if _, err := os.Stat(socket); err != nil {
		return nil, err
	}
	return grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// AskContainerd asks the containerd that runs what it is, and what it has made of the snapshotter of that name.
func AskContainerd(ctx context.Context, socket, snapshotter string) (c Containerd) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := connectTo(socket)
	if err != nil {
		return Containerd{Err: err}
	}
	defer conn.Close()
	v, err := version.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return Containerd{Err: err}
	}
	c = Containerd{Version: v.GetVersion(), Plugins: map[string]string{}}
	client := introspection.NewIntrospectionClient(conn)
	plugins, err := client.Plugins(ctx, &introspection.PluginsRequest{})
	if err != nil {
		return Containerd{Err: fmt.Errorf("list plugins: %w", err)}
	}
	ours := "io.containerd.snapshotter.v1." + snapshotter
	for _, p := range plugins.GetPlugins() {
		switch id := p.GetType() + "." + p.GetID(); id {
		case ours, pluginImages, pluginRuntime, pluginCRI, pluginTransfer:
			c.Plugins[id] = p.GetInitErr().GetMessage()
			if id == ours {
				c.Capabilities, c.Exports = p.GetCapabilities(), p.GetExports()
			}
		}
	}
	if server, err := client.Server(ctx, &emptypb.Empty{}); err == nil {
		c.SysResource = sysResource(server.GetPid())
		c.PID, c.PIDNamespace = int(server.GetPid()), server.GetPidns() //nolint:gosec // a pid is an int
	}
	return c
}

// sysResource reads a process's effective capabilities; nil if there is no such process here.
func sysResource(pid uint64) *bool {
	data, err := os.ReadFile("/proc/" + strconv.FormatUint(pid, 10) + "/status")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(data)) {
		if bits, ok := strings.CutPrefix(line, "CapEff:"); ok {
			if set, err := strconv.ParseUint(strings.TrimSpace(bits), 16, 64); err == nil {
				has := set&(1<<unix.CAP_SYS_RESOURCE) != 0
				return &has
			}
		}
	}
	return nil
}

// askSnapshotter asks for a snapshot that is not there.
func askSnapshotter(ctx context.Context, socket string) error {
	if socket == "" {
		return errors.New("containerd's configuration does not say where it is")
	}
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, "containerd-namespace", "hearth-doctor"), askTimeout)
	defer cancel()
	conn, err := connectTo(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = snapshots.NewSnapshotsClient(conn).Stat(ctx, &snapshots.StatSnapshotRequest{Key: "hearth-doctor"})
	if err == nil || status.Code(err) == codes.NotFound {
		return nil
	}
	return fmt.Errorf("%s: %w", socket, err)
}

func askNodeagent(ctx context.Context, socket string) error {
	if _, err := os.Stat(socket); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	stream, err := hearthv1connect.NewNodeServiceClient(daemon.UnixClient(socket), "http://hearth").
		WatchInstances(ctx, connect.NewRequest(&hearthv1.WatchInstancesRequest{}))
	if err != nil {
		return fmt.Errorf("%s: %w", socket, err)
	}
	defer stream.Close()
	if !stream.Receive() {
		return fmt.Errorf("%s: %w", socket, errors.Join(stream.Err(), ctx.Err()))
	}
	return nil
}

func readKubelet(path string) (*Kubelet, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("kubelet's configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes))
	if err != nil {
		return nil, fmt.Errorf("kubelet's configuration %s: %w", path, err)
	}
	k, err := parseKubelet(data)
	if err != nil {
		return nil, fmt.Errorf("kubelet's configuration %s: %w", path, err)
	}
	k.Path = path
	return k, nil
}

// parseKubelet reads what matters of a KubeletConfiguration, with the kubelet's own defaults.
func parseKubelet(data []byte) (*Kubelet, error) {
	var written struct {
		CgroupDriver string `yaml:"cgroupDriver"`
		FailCgroupV1 *bool  `yaml:"failCgroupV1"`
	}
	if err := yaml.Unmarshal(data, &written); err != nil {
		return nil, err
	}
	k := &Kubelet{CgroupDriver: written.CgroupDriver, FailCgroupV1: written.FailCgroupV1 == nil || *written.FailCgroupV1}
	if k.CgroupDriver == "" {
		k.CgroupDriver = "cgroupfs"
	}
	return k, nil
}

// Magic numbers of file systems, from linux/magic.h.
var fileSystems = map[int64]string{
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay",
	unix.TMPFS_MAGIC: "tmpfs", unix.NFS_SUPER_MAGIC: "nfs", unix.FUSE_SUPER_MAGIC: "fuse", unix.F2FS_SUPER_MAGIC: "f2fs",
}

func disk(root string) *Disk {
	d := &Disk{Path: root}
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		d.Err = fmt.Errorf("%s: %w", root, err)
		return d
	}
	block := uint64(st.Bsize)
	d.Type = fileSystems[int64(st.Type)]
	if d.Type == "" {
		d.Type = fmt.Sprintf("type %#x", st.Type)
	}
	d.Bytes, d.FreeBytes = st.Blocks*block, st.Bavail*block
	d.Inodes, d.FreeInodes = st.Files, st.Ffree
	return d
}
