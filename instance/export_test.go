package instance

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/go-digest"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/sidecar/control"
)

// What a fake containerd is made of.
type (
	Sandbox       = sandbox
	Image         = image
	Rootfs        = rootfs
	Container     = container
	Launcher      = launcher
	Record        = record
	ContainerInfo = containerInfo
	Exit          = exit
	Launch        = launch
	Attachment    = attachment
	CodeTree      = codeTree
	Sidecar       = sidecar
)

// Labels that a restarted engine reads.
const (
	LabelInstance, LabelClaim, LabelEpoch   = labelInstance, labelClaim, labelEpoch
	LabelFunction, LabelRevision, LabelPort = labelFunction, labelRevision, labelPort
	LabelFrozen, LabelVersion               = labelFrozen, labelVersion
)

// NewWithBackend makes an Engine over a fake containerd, whose cgroups and processes are directories below host.
func NewWithBackend(cfg Config, b backend, host string) (*Engine, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	return newEngine(cfg, b, cgroups{root: filepath.Join(host, "cgroup"), parent: cfg.CgroupParent}, filepath.Join(host, "proc"))
}

// Watch is WatchInstances without a connection, of nobody's term.
func (e *Engine) Watch(ctx context.Context, send func(*hearthv1.WatchInstancesResponse) error) error {
	return e.watch(ctx, 0, send)
}

// WatchIn is Watch of a term.
func (e *Engine) WatchIn(ctx context.Context, epoch int64, send func(*hearthv1.WatchInstancesResponse) error) error {
	return e.watch(ctx, epoch, send)
}

// StreamLogs is Logs without a connection.
func (e *Engine) StreamLogs(ctx context.Context, req *hearthv1.LogsRequest, send func(*hearthv1.LogsResponse) error) error {
	return e.streamLogs(ctx, req, send)
}

// LogPath is an Instance's log file, which is made if it is not there.
func (e *Engine) LogPath(function, instance string) (string, error) {
	path := filepath.Join(e.logs.dir(function), instance+logSuffix)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	output := filepath.Join(e.cfg.Root, instance)
	if err := os.WriteFile(output, nil, 0o600); err != nil {
		return "", err
	}
	return e.logs.claim(function, instance, output)
}

// Reconcile compares with containerd now.
func (e *Engine) Reconcile(ctx context.Context) error { return e.reconcile(ctx) }

// SplitLines returns the lines that are sent when a file's text arrives in two parts.
func SplitLines(first, second []byte) ([][]byte, error) {
	var lines [][]byte
	r := &logReader{send: func(l *hearthv1.LogsResponse) error { lines = append(lines, l.Line); return nil }}
	p := &position{}
	for i, part := range [][]byte{first, second} {
		var from io.Reader = bytes.NewReader(part)
		if err := r.sendLines(context.Background(), "x", p, from, i == 1); err != nil {
			return nil, err
		}
	}
	return lines, nil
}

// ConnectError gives an error its code.
func ConnectError(err error) error { return connectError(err) }

// Detach mounts a snapshot where nobody sees it, with a tmpfs for what is written to it.
func Detach(mounts []mount.Mount, scratch string) (r Rootfs, err error) {
	r.Tree, r.Upper, err = detach(mounts, scratch)
	return r, err
}

// Close lets go of both.
func (r rootfs) Close() { r.close() }

// MakeRoom lets so much be written.
func (r rootfs) MakeRoom(bytes int64) error { return r.makeRoom(bytes) }

// RelativeLowers shortens an overlay's options.
func RelativeLowers(options []string) (base, joined string) { return relativeLowers(options) }

// Keep is a frozen Instance as an eviction sees it.
type Keep struct {
	ID    string
	Age   time.Duration
	Thaws int
	Bytes int64
}

func (k Keep) keep() keep { return keep{id: k.ID, age: k.Age, thaws: k.Thaws, bytes: k.Bytes} }

// Worth of keeping it.
func (k Keep) Worth() float64 { return k.keep().worth() }

// Surplus tells which go.
func Surplus(all []Keep, count int, total int64) (ids, reasons []string) {
	var inner []keep
	for _, k := range all {
		inner = append(inner, k.keep())
	}
	return surplus(inner, count, total)
}

// Stall, MemInfo and EndPending read what the kernel says.
func EndPending(status []byte) bool { return endPending(status) }

// Freezer is that of an Instance's cgroup PARENT/pod-x/fn, below root.
type Freezer struct{ c cgroups }

// memberX is the Instance that it is of.
var memberX = member{"x", "x"}

// NewFreezer makes one.
func NewFreezer(root, parent string) Freezer { return Freezer{cgroups{root: root, parent: parent}} }

// Directory is the cgroup's: in the freezer's hierarchy, where there are several.
func (f Freezer) Directory() string {
	return filepath.Dir(f.c.file(memberX, "freezer", "freezer.state", "cgroup.freeze"))
}

// Freeze freezes it.
func (f Freezer) Freeze(ctx context.Context) error { return f.c.freeze(ctx, memberX) }

// Thaw thaws it.
func (f Freezer) Thaw() error { return f.c.thaw(memberX) }

// Thawed tells whether it is.
func (f Freezer) Thawed() (bool, error) { return f.c.thawed(memberX) }

// Loader is the conversation with a loader.
type Loader struct{ *loader }

// What is said in it.
type (
	LoadQuestion = loadQuestion
	LoadPhase    = loadPhase
	Greeting     = greeting
)

// NewLoader takes over a connection.
func NewLoader(conn net.Conn, exited <-chan struct{}) Loader { return Loader{newLoader(conn, exited)} }

// Greet waits for the first word.
func (l Loader) Greet(ctx context.Context) (*Greeting, error) { return l.greet(ctx) }

// MissingLibraries describes what was not preloaded.
func (g *greeting) MissingLibraries() []string { return g.missingLibraries() }

// Load has a Function loaded; told hears what it imports.
func (l Loader) Load(ctx context.Context, q LoadQuestion, told ...func([]ImportedModule, time.Duration)) ([]LoadPhase, bool, error) {
	return l.load(ctx, q, func(list imports, took time.Duration) {
		for _, tell := range told {
			tell(list.Modules, took)
		}
	})
}

// ImportedModule is one that a loader tells of.
type ImportedModule = importedModule

// ImportBook is what an engine remembers of imports.
type ImportBook struct{ b importBook }

// Add takes in a start.
func (b *ImportBook) Add(runtime string, generation int64, function string, modules []ImportedModule, took time.Duration) {
	b.b.add(&booted{name: runtime, generation: generation}, function, imports{modules}, took)
}

// List describes what is known.
func (b *ImportBook) List(runtime string) []*hearthv1.RuntimeImports { return b.b.list(runtime) }

// Thawed tells of a thaw.
func (l Loader) Thawed(ctx context.Context, frozenFor time.Duration) error {
	answered, err := l.thawed(ctx, frozenFor)
	if err != nil {
		return err
	}
	return answered()
}

// Close lets go.
func (l Loader) Close() { l.close() }

// Gone is why it ended.
func (l Loader) Gone() error { return l.gone() }

// Thawed tells an Instance, if it is one to be told, that it was frozen.
func (e *Engine) Thawed(ctx context.Context, id string, frozenFor time.Duration) error {
	i, _ := e.lookup(id)
	i.mu.Lock()
	b := i.booted
	i.mu.Unlock()
	if b == nil {
		return nil
	}
	answered, _, err := b.thawed(ctx, frozenFor)
	if err != nil {
		return err
	}
	return answered()
}

// NewView mounts a code package's tree where nobody sees it.
func NewView(mounts []mount.Mount, scratch string) (CodeTree, error) {
	return newView(mounts, scratch, nil)
}

// SecretsTree is a file system of secrets.
func SecretsTree(secrets map[string][]byte) (*os.File, error) { return secretsTree(secrets) }

// CopyTree copies a directory to a place below a root.
func CopyTree(ctx context.Context, root, path, source string) error {
	to, err := os.Open(root)
	if err != nil {
		return err
	}
	defer to.Close()
	from, err := os.Open(source)
	if err != nil {
		return err
	}
	defer from.Close()
	return copyTree(ctx, to, attachment{Path: path, Tree: from})
}

// WriteLauncherRoot makes the root file system of launchers.
func WriteLauncherRoot(root, program string) (string, error) {
	return writeLauncherRoot(root, map[string]string{launcherProgram: program})
}

// AwaitLauncher finds a launcher that was started.
func AwaitLauncher(ctx context.Context, pid uint32, control string) (Launcher, error) {
	l, err := awaitLauncher(ctx, pid, control)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// SidecarServe is what a Revision's sidecar is told.
func SidecarServe(ip string, r *hearthv1.Revision) control.Serve {
	return sidecarServe(netip.MustParseAddr(ip), r)
}

// WithDefaults is the Config as the engine takes it.
func (c Config) WithDefaults() (Config, error) { return c.withDefaults() }

// ParsePodGroup reads a /proc/PID/cgroup.
func ParsePodGroup(text []byte) (string, error) { return parsePodGroup(text) }

// FunctionGroup is the cgroup of a Function in a pod's, and what runc is told of it.
func FunctionGroup(pod, id string) (path, runc string) {
	learnt := &podGroups{paths: map[string]string{}}
	learnt.learn(id, pod)
	path = cgroups{learnt: learnt}.function(member{id, id})
	return path, runcPath(path)
}

// ShowTree has who enters a pod's mount namespace see a function's files.
func ShowTree(function, pod uint32) error {
	from, err := os.Open(namespacePath(function, "mnt"))
	if err != nil {
		return err
	}
	defer from.Close()
	to, root, err := holder{Pid: pod}.open()
	if err != nil {
		return err
	}
	defer to.Close()
	defer root.Close()
	return showTree(from, to, root)
}

// HideTree ends that.
func HideTree(pod uint32) error {
	p := newPod("x")
	i := newInstance("x", p)
	i.sandbox.Holder.Pid = pod
	return i.hide()
}

// InMountsOf runs f in a process's mount namespace.
func InMountsOf(pid uint32, f func() error) error {
	namespace, err := os.Open(namespacePath(pid, "mnt"))
	if err != nil {
		return err
	}
	defer namespace.Close()
	return inMountsOf(namespace, f)
}

// LayersOf says where an image's layers are.
func LayersOf(mounts []mount.Mount, diffIDs []digest.Digest) []prefetch.Layer {
	return layersOf(mounts, diffIDs)
}
