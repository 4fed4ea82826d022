package instance

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hearth-serverless/hearth/prefetch"
)

// backend is what the engine needs of containerd. Errors are those of errdefs, so that NotFound and Unavailable can be told.
// It is one interface because one containerd is behind it; it is written as its parts, each of them small.
type backend interface {
	sandboxes
	images
	snapshots
	views
	tasks
	sidecars
	containerList
	networks
}

type sandboxes interface {
	// RunSandbox makes the sandbox of a pod, or waits for the one that the kubelet makes, and returns when its network is up.
	RunSandbox(ctx context.Context, pod string) (sandbox, error)
	// Sandboxes lists every sandbox that belongs to a pod of ours: their identity and whether they are ready, no more.
	Sandboxes(ctx context.Context) ([]sandbox, error)
	// Inspect fills in what Sandboxes leaves out.
	Inspect(ctx context.Context, sandboxID string) (sandbox, error)
	// RemoveSandbox stops and removes a sandbox, its network and its cgroups; of one that is the kubelet's, only the cgroups that are
	// ours. One that is not there is no error.
	RemoveSandbox(ctx context.Context, sandboxID, pod string) error
}

type images interface {
	// Image describes an image that is here and unpacked; NotFound otherwise.
	Image(ctx context.Context, ref string) (*image, error)
	// Pull brings an image here, unpacked.
	Pull(ctx context.Context, ref string) error
	// RemoveImage forgets an image under all its names and returns when its content and snapshots are gone, unless used.
	RemoveImage(ctx context.Context, ref string) error
}

type snapshots interface {
	// PrepareSnapshot makes a writable snapshot of an image, kept from garbage collection. NotFound if the image is gone.
	PrepareSnapshot(ctx context.Context, key string, img *image) (rootfs, error)
	// RemoveSnapshot removes one; that it is not there is no error.
	RemoveSnapshot(ctx context.Context, key string) error
	// PreparedSnapshots lists the keys of all that PrepareSnapshot has made and that are still there.
	PreparedSnapshots(ctx context.Context) ([]string, error)
}

type views interface {
	// View mounts an image's tree read-only where nobody sees it, by a snapshot of that key, which RemoveSnapshot removes.
	// NotFound if the image is gone.
	View(ctx context.Context, key string, img *image) (codeTree, error)
}

// codeTree is the mounted tree of a code package.
type codeTree interface {
	// Clone mounts it once more, for one container.
	Clone() (*os.File, error)
	// Layers are what it shows; nil if that is not known.
	Layers() []prefetch.Layer
	// Close lets go of it. Clones stay, as long as the snapshot or a layer of it is there.
	Close() error
}

type tasks interface {
	// CreateTask makes a sandbox's container, in which the launcher runs, and returns when that waits for what to become.
	CreateTask(ctx context.Context, c container) (launcher, error)
	// FindTask finds the launcher of a container that a former engine made, or the loader that it has become. It is an error if
	// it is not that any more.
	FindTask(ctx context.Context, c container) (launcher, error)
	// StopTask ends the process (SIGTERM, then SIGKILL after grace) and whatever else is in the container's cgroup, and removes
	// container and process. One that is not there is no error.
	StopTask(ctx context.Context, containerID, cgroup string, grace time.Duration) error
	// AwaitEnd returns when a process has ended, or is not there.
	AwaitEnd(ctx context.Context, pid uint32) error
	// Record notes with a container what it has become: image, snapshot, process and labels.
	Record(ctx context.Context, r record) error
	// Label changes labels of a container. An empty value removes one.
	Label(ctx context.Context, containerID string, labels map[string]string) error
}

// launcher is what waits in a container until a Function is known, and is our way to that container when it has become the
// Function's process or a loader. It is one process all the time, hence one interface of six methods.
type launcher interface {
	// Launch gives the container another root file system and executes the process there, in the launcher's place. After an
	// error the container is good for nothing.
	Launch(ctx context.Context, l launch) error
	// Dial connects to the loader that was launched.
	Dial(ctx context.Context) (net.Conn, error)
	// Mount shows trees to every process of the container, read-only.
	Mount(ctx context.Context, list ...attachment) error
	// LimitTmp bounds what the container's /tmp takes.
	LimitTmp(bytes int64) error
	// Pid is that of the launcher, and then of the Function's process.
	Pid() uint32
	// Close lets go of it; it waits on.
	Close() error
}

// launch is what a launcher is to become.
type launch struct {
	Root     rootfs
	Process  *specs.Process
	Loader   bool // it is a loader, which is to hear us
	Writable bool // its root, which is read-only otherwise
}

type containerList interface {
	// Containers lists those that CreateTask made.
	Containers(ctx context.Context) ([]containerInfo, error)
	// Exits calls tell for each process that ends, until ctx is done or the connection fails. Subscribed is called when it listens.
	Exits(ctx context.Context, subscribed func(), tell func(exit)) error
	// Ready says whether containerd and its CRI answer and have a network.
	Ready(ctx context.Context) error
}

// sandbox is a CRI sandbox.
type sandbox struct {
	ID      string
	Pod     string // by the Instance that it was made for
	Ready   bool
	Created time.Time
	Foreign bool // the kubelet has made it, and removes it
	// From here on only Inspect and RunSandbox know.
	IP      netip.Addr
	Pid     uint32 // of the pause process, which holds the namespaces
	Netns   uint64 // inode of the network namespace
	Runtime containers.RuntimeInfo
	Holder  holder // the pod's own container, if the kubelet has made it
}

// holder is the container that a Pod of the kubelet's names. It only waits: what runs in the pod is ours, and seen through it.
type holder struct {
	ID    string
	Pid   uint32
	Pipe  uint64            // inode of the pipe that its output goes to, from where kubectl logs has it
	Group string            // cgroup of the pod
	Etc   map[string][]byte // its files in /etc, by name
}

// image is what the engine remembers of an image, so that it need not ask when a request waits.
type image struct {
	Ref     string
	Digest  digest.Digest
	ChainID string
	DiffIDs []digest.Digest
	Config  ocispec.ImageConfig
}

// rootfs is a prepared snapshot.
type rootfs struct {
	Key   string
	Tree  *os.File   // its mount, which nobody sees; nil if it is not prepared to the end
	Upper *os.File   // the tmpfs that has what is written to Tree; likewise
	User  specs.User // the image's user, looked up in its passwd and group

	Layers []prefetch.Layer // what Tree shows; nil if that is not known
}

// close lets go of the mounts, which end unless a container has them.
func (r rootfs) close() {
	for _, f := range []*os.File{r.Tree, r.Upper} {
		if f != nil {
			_ = f.Close() // it was never written to
		}
	}
}

// makeRoom lets so much be written to it.
func (r rootfs) makeRoom(bytes int64) error {
	if err := resize(int(r.Upper.Fd()), "", bytes); err != nil {
		return fmt.Errorf("limit what is written to the root: %w", err)
	}
	return nil
}

// container is all that CreateTask needs.
type container struct {
	ID      string
	Labels  map[string]string
	Sandbox sandbox
	Spec    *specs.Spec
	Output  string // where stdout and stderr go, as containerd takes it
	Control string // directory of the launcher's socket
	Loader  bool   // the launcher has become a loader
}

// record is what a container has become. Without a Spec, what is recorded of its process stays.
type record struct {
	ID, Image, Snapshot string
	Labels              map[string]string
	Spec                *specs.Spec
}

// containerInfo is a container as it is found.
type containerInfo struct {
	ID, Snapshot string
	Labels       map[string]string
	Pid          uint32
	Running      bool // or paused by somebody
	Ended        bool // its process has been executed and has ended
}

// exit is the end of a process.
type exit struct {
	Container string // a Function's container, or a sandbox
	Status    uint32
}
