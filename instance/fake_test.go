package instance_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/instance"
	"github.com/hearth-serverless/hearth/prefetch"
)

// fake is a containerd in memory. Its functions listen as soon as they are started, unless listens says otherwise.
type fake struct {
	mu         sync.Mutex
	down       bool
	next       int
	sandboxes  map[string]instance.Sandbox
	containers map[string]instance.ContainerInfo
	snapshots  map[string]bool
	images     map[string]bool
	pulls      int
	launched   map[string]bool // by container
	started    int
	grace      time.Duration // of the last StopTask
	listens    bool
	exits      chan instance.Exit
	crash      chan struct{} // the kernel says that a process has ended
	prefetch   instance.Prefetcher
	layers     []prefetch.Layer // of every image
	onLaunch   func(ctx context.Context) error
	onLabel    func(ctx context.Context) error
	host       string // where the fake's cgroups and /proc are, like the kernel's
	config     instance.Config
	loaders    map[string]bool                // containers whose launcher became a loader
	loader     func(id string, conn net.Conn) // what a loader says; nil: wellBehaved
	mounted    map[string][]string            // paths, by container
	views      map[string]string              // image by key
	sidecars   map[string]*fakeSidecar        // by container
	cgroups    sync.Map                       // paths, by Instance, once it has a container
	foreign    bool                           // sandboxes are the kubelet's
	mentioned  map[string]bool                // network namespaces in containerd's records
}

func newFake(t *testing.T) *fake {
	t.Helper()
	return &fake{
		host:      t.TempDir(),
		sandboxes: map[string]instance.Sandbox{}, containers: map[string]instance.ContainerInfo{}, snapshots: map[string]bool{},
		images: map[string]bool{}, launched: map[string]bool{}, listens: true, exits: make(chan instance.Exit), crash: make(chan struct{}),
		loaders: map[string]bool{}, mounted: map[string][]string{}, views: map[string]string{}, sidecars: map[string]*fakeSidecar{}}
}

func (f *fake) locked(do func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return errdefs.ErrUnavailable
	}
	return do()
}

func (f *fake) RunSandbox(ctx context.Context, id string) (s instance.Sandbox, err error) {
	err = f.locked(func() error {
		f.next++
		s = instance.Sandbox{
			ID: fmt.Sprintf("box-%d", f.next), Pod: id, Ready: true, Created: time.Now(),
			IP: netip.AddrFrom4([4]byte{10, 0, byte(f.next >> 8), byte(f.next)}), Pid: uint32(f.next), Netns: uint64(f.next),
			Foreign: f.foreign,
		}
		if f.foreign {
			s.Holder.ID = fmt.Sprintf("holder-%d", f.next)
		}
		f.sandboxes[s.ID] = s
		return ctx.Err()
	})
	return s, err
}

func (f *fake) Sandboxes(context.Context) (all []instance.Sandbox, err error) {
	err = f.locked(func() error { all = slices.Collect(maps.Values(f.sandboxes)); return nil })
	return all, err
}

func (f *fake) Inspect(_ context.Context, id string) (s instance.Sandbox, err error) {
	err = f.locked(func() error {
		var ok bool
		if s, ok = f.sandboxes[id]; !ok {
			return errdefs.ErrNotFound
		}
		return nil
	})
	return s, err
}

func (f *fake) RemoveSandbox(_ context.Context, id, _ string) error {
	return f.locked(func() error { delete(f.sandboxes, id); return nil })
}

func (f *fake) Image(_ context.Context, ref string) (img *instance.Image, err error) {
	err = f.locked(func() error {
		if !f.images[ref] {
			return errdefs.ErrNotFound
		}
		img = &instance.Image{
			Ref: ref, Digest: digest.FromString("image"), ChainID: f.chainOf(ref), Config: ocispec.ImageConfig{Entrypoint: []string{"/function"}},
		}
		return nil
	})
	return img, err
}

// chainOf gives code packages chains of their own.
func (f *fake) chainOf(ref string) string {
	if strings.Contains(ref, "/code") {
		return "chain of " + ref
	}
	return "chain"
}

func (f *fake) View(_ context.Context, key string, img *instance.Image) (instance.CodeTree, error) {
	return &fakeView{f, key}, f.locked(func() error {
		if !f.images[img.Ref] {
			return errdefs.ErrNotFound
		}
		f.snapshots[key], f.views[key] = true, img.Ref
		return nil
	})
}

// fakeView is one of fake's.
type fakeView struct {
	f   *fake
	key string
}

func (v *fakeView) Clone() (*os.File, error) {
	file, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	return file, v.f.locked(func() error {
		if !v.f.snapshots[v.key] {
			return errdefs.ErrNotFound
		}
		return nil
	})
}

func (*fakeView) Close() error { return nil }

func (v *fakeView) Layers() []prefetch.Layer {
	if v.f.layers == nil {
		return nil
	}
	return []prefetch.Layer{{DiffID: digest.FromString("code"), Dir: "/code"}}
}

func (f *fake) Pull(_ context.Context, ref string) error {
	return f.locked(func() error { f.pulls++; f.images[ref] = true; return nil })
}

func (f *fake) RemoveImage(_ context.Context, ref string) error {
	return f.locked(func() error { delete(f.images, ref); return nil })
}

func (f *fake) PrepareSnapshot(_ context.Context, key string, img *instance.Image) (instance.Rootfs, error) {
	err := f.locked(func() error {
		if !f.images[img.Ref] {
			return errdefs.ErrNotFound
		}
		f.snapshots[key] = true
		return nil
	})
	return instance.Rootfs{Key: key, Layers: f.layers}, err
}

func (f *fake) RemoveSnapshot(_ context.Context, key string) error {
	return f.locked(func() error { delete(f.snapshots, key); return nil })
}

func (f *fake) PreparedSnapshots(context.Context) (keys []string, err error) {
	err = f.locked(func() error { keys = slices.Collect(maps.Keys(f.snapshots)); return nil })
	return keys, err
}

// cgroupFile is a file of an Instance's cgroup.
func (f *fake) cgroupFile(id, hierarchy, name string) string {
	path, made := f.cgroups.Load(id)
	if !made {
		path = filepath.Join("hearth-fake", "pod-"+id, "fn")
	}
	return filepath.Join(f.host, "cgroup", hierarchy, path.(string), name)
}

// makeCgroup makes an Instance's cgroup as version 1 has them, with its freezer in a state.
func (f *fake) makeCgroup(id, state string) error {
	for path, text := range map[string]string{
		f.cgroupFile(id, "freezer", "freezer.state"):        state,
		f.cgroupFile(id, "memory", "memory.usage_in_bytes"): "3145728",
		f.cgroupFile(id, "cpuacct", "cpuacct.usage"):        "1500000000",
		f.cgroupFile(id, "memory", "memory.stat"):           "total_inactive_file 1048576\n",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			return err
		}
	}
	return nil
}

// labels are those of an Instance's container.
func (f *fake) labels(id string) map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.containers[id+".fn"].Labels)
}

// freezer is the state of an Instance's freezer.
func (f *fake) freezer(t *testing.T, id string) string {
	t.Helper()
	text, err := os.ReadFile(f.cgroupFile(id, "freezer", "freezer.state"))
	if err != nil {
		t.Error(err)
	}
	return string(text)
}

func (f *fake) CreateTask(_ context.Context, c instance.Container) (instance.Launcher, error) {
	err := f.locked(func() error {
		if _, ok := f.containers[c.ID]; ok {
			return errdefs.ErrAlreadyExists
		}
		f.containers[c.ID] = instance.ContainerInfo{ID: c.ID, Labels: c.Labels, Running: true}
		f.cgroups.Store(strings.TrimSuffix(c.ID, ".fn"), c.Spec.Linux.CgroupsPath)
		return f.makeCgroup(strings.TrimSuffix(c.ID, ".fn"), "THAWED")
	})
	return &fakeLauncher{f, c.ID}, err
}

func (f *fake) FindTask(_ context.Context, c instance.Container) (instance.Launcher, error) {
	return &fakeLauncher{f, c.ID}, f.locked(func() error {
		if f.launched[c.ID] && !c.Loader {
			return errdefs.ErrFailedPrecondition
		}
		return nil
	})
}

// fakeLauncher is one of fake's.
type fakeLauncher struct {
	f  *fake
	id string
}

func (l *fakeLauncher) Launch(ctx context.Context, what instance.Launch) error {
	if l.f.onLaunch != nil {
		if err := l.f.onLaunch(ctx); err != nil {
			return err
		}
	}
	return l.f.locked(func() error {
		l.f.started++
		l.f.launched[l.id], l.f.loaders[l.id] = true, what.Loader
		return nil
	})
}

// Dial is answered by a goroutine that ends with the connection.
func (l *fakeLauncher) Dial(context.Context) (net.Conn, error) {
	say := l.f.loader
	if say == nil {
		say = wellBehaved
	}
	ours, theirs := net.Pipe()
	go func() {
		say(l.id, theirs)
		_ = theirs.Close()
	}()
	return ours, nil
}

func (l *fakeLauncher) Mount(_ context.Context, list ...instance.Attachment) error {
	return l.f.locked(func() error {
		for _, a := range list {
			l.f.mounted[l.id] = append(l.f.mounted[l.id], a.Path)
		}
		return nil
	})
}

func (*fakeLauncher) LimitTmp(int64) error { return nil }

func (*fakeLauncher) Pid() uint32 { return 1 }

func (*fakeLauncher) Close() error { return nil }

func (f *fake) StopTask(_ context.Context, id, _ string, grace time.Duration) error {
	return f.locked(func() error {
		state, _ := os.ReadFile(f.cgroupFile(strings.TrimSuffix(id, ".fn"), "freezer", "freezer.state"))
		if string(state) == "FROZEN" {
			return errors.New("a frozen process takes no signal")
		}
		if _, is := f.sidecars[id]; is {
			delete(f.sidecars, id)
			return nil
		}
		f.grace = grace
		delete(f.containers, id)
		for _, hierarchy := range []string{"cpuacct", "freezer", "memory"} {
			if err := os.RemoveAll(f.cgroupFile(strings.TrimSuffix(id, ".fn"), hierarchy, "")); err != nil {
				return err
			}
		}
		return nil
	})
}

func (f *fake) AwaitEnd(ctx context.Context, _ uint32) error {
	select {
	case <-f.crash:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *fake) Record(_ context.Context, r instance.Record) error {
	return f.locked(func() error {
		c, ok := f.containers[r.ID]
		if !ok {
			return errdefs.ErrNotFound
		}
		c.Labels, c.Snapshot = r.Labels, r.Snapshot
		f.containers[r.ID] = c
		return nil
	})
}

func (f *fake) Label(ctx context.Context, id string, labels map[string]string) error {
	if f.onLabel != nil {
		if err := f.onLabel(ctx); err != nil {
			return err
		}
	}
	return f.locked(func() error {
		c, ok := f.containers[id]
		if !ok {
			return errdefs.ErrNotFound
		}
		c.Labels = maps.Clone(c.Labels)
		maps.Copy(c.Labels, labels)
		maps.DeleteFunc(c.Labels, func(_, v string) bool { return v == "" })
		f.containers[id] = c
		return nil
	})
}

func (f *fake) Containers(context.Context) (all []instance.ContainerInfo, err error) {
	err = f.locked(func() error { all = slices.Collect(maps.Values(f.containers)); return nil })
	return all, err
}

func (f *fake) Exits(ctx context.Context, subscribed func(), tell func(instance.Exit)) error {
	subscribed()
	for {
		select {
		case x := <-f.exits:
			tell(x)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (f *fake) Mentioned(context.Context, []string) (names map[string]bool, err error) {
	err = f.locked(func() error { names = maps.Clone(f.mentioned); return nil })
	return names, err
}

func (f *fake) Ready(context.Context) error { return f.locked(func() error { return nil }) }

// dial is how the engine finds out whether a function listens.
func (f *fake) dial(context.Context, netip.AddrPort) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.listens {
		return errors.New("refused")
	}
	return nil
}

// set changes the fake while the engine runs.
func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// left tells what is in containerd, which is nothing when all Instances have gone.
func (f *fake) left() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return fmt.Sprintf("%d sandboxes, %d containers, %d snapshots", len(f.sandboxes), len(f.containers), len(f.snapshots))
}

const nothing = "0 sandboxes, 0 containers, 0 snapshots"

// run makes an engine over the fake, which runs until the test ends, and waits until it answers.
func run(t *testing.T, f *fake) *instance.Engine {
	t.Helper()
	e, stop := runUntil(t, f)
	t.Cleanup(stop)
	return e
}

// runUntil is run with an end.
func runUntil(t *testing.T, f *fake) (*instance.Engine, func()) {
	t.Helper()
	return runIn(t, f, t.TempDir())
}

// runIn is runUntil with a directory of its own.
func runIn(t *testing.T, f *fake, root string) (*instance.Engine, func()) {
	t.Helper()
	cfg := f.config
	cfg.Node, cfg.Root, cfg.Address, cfg.CgroupParent, cfg.ResolvConf = "node", root, "/none", "/hearth-fake", "/none"
	cfg.Dial, cfg.Prefetch, cfg.Launcher = f.dial, f.prefetch, "/none"
	e, err := instance.NewWithBackend(cfg, f, f.host)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- e.Run(ctx) }()
	for e.Ready(ctx) != nil {
		if f.isDown() {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return e, func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
	}
}

func (f *fake) isDown() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.down
}

func revision() *hearthv1.Revision {
	return &hearthv1.Revision{Name: "hello-00001", Function: "hello", Image: "example.org/hello:1", Port: 8080}
}

func create(e *instance.Engine, id string) error {
	_, err := e.CreateInstance(context.Background(), connect.NewRequest(&hearthv1.CreateInstanceRequest{Id: id}))
	return err
}

func activate(e *instance.Engine, id, claim string, epoch int64, within time.Duration) (*hearthv1.ActivateResponse, error) {
	r, err := e.Activate(context.Background(), connect.NewRequest(&hearthv1.ActivateRequest{
		InstanceId: id, Revision: revision(),
		Claim: &hearthv1.Claim{Id: claim, Epoch: epoch, Deadline: timestamppb.New(time.Now().Add(within))},
	}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

func discard(e *instance.Engine, id string, epoch int64) error {
	_, err := e.Discard(context.Background(), connect.NewRequest(&hearthv1.DiscardRequest{
		InstanceId: id, Epoch: epoch, Grace: durationpb.New(0),
	}))
	return err
}

func freeze(e *instance.Engine, id string, epoch int64) (*hearthv1.Instance, error) {
	r, err := e.Freeze(context.Background(), connect.NewRequest(&hearthv1.FreezeRequest{InstanceId: id, Epoch: epoch}))
	if err != nil {
		return nil, err
	}
	return r.Msg.Instance, nil
}

func prepare(e *instance.Engine, n int32) (*hearthv1.PrepareRevisionResponse, error) {
	r, err := e.PrepareRevision(context.Background(), connect.NewRequest(&hearthv1.PrepareRevisionRequest{Revision: revision(), Snapshots: n}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

// list is what a new subscriber hears.
func list(t *testing.T, e *instance.Engine) map[string]*hearthv1.Instance {
	t.Helper()
	all := map[string]*hearthv1.Instance{}
	err := e.Watch(context.Background(), func(r *hearthv1.WatchInstancesResponse) error {
		if r.GetSynced() {
			return errSynced
		}
		all[r.GetInstance().Id] = r.GetInstance()
		return nil
	})
	if !errors.Is(err, errSynced) {
		t.Fatal(err)
	}
	return all
}

var errSynced = errors.New("synced")

func wantCode(t *testing.T, err error, code connect.Code) {
	t.Helper()
	if connect.CodeOf(err) != code {
		t.Errorf("got %v, want %s", err, code)
	}
}
