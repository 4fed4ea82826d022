package instance

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/sidecar/control"
)

// Paths in a sidecar's root file system, which is the launchers'.
const (
	sidecarProgram = "/sidecar"
	sidecarControl = launcherControl
)

const (
	// sidecarPort is where requests come in, sidecarPort+1 where probes do, unless the Function listens there.
	sidecarPort = 8012
	// sidecarUser is nobody that any image knows.
	sidecarUser = 65532
	// sidecarOOMScore makes it a less likely victim than the Function that it belongs to.
	sidecarOOMScore = oomScore / 2

	sidecarQueue = 100
	// sidecarMost is the concurrency where nobody has said any: the gateways' limit then is the only one.
	sidecarMost = 1000

	// sidecarBytes is its memory limit, which pays for sidecarBusy requests; each more has its connectionBytes.
	sidecarBytes, sidecarBusy, connectionBytes = 24 << 20, 110, 64 << 10
)

// sidecars is the part of a backend that makes them.
type sidecars interface {
	// CreateSidecar makes the container of a sandbox's sidecar, and returns when that can be told what to serve.
	CreateSidecar(ctx context.Context, c container) (sidecar, error)
	// FindSidecar finds the one that a former engine made.
	FindSidecar(ctx context.Context, c container) (sidecar, error)
}

// sidecar is control.Client, which see, where a fake may stand.
type sidecar interface {
	Status() control.Status
	Serve(ctx context.Context, s control.Serve) (control.Serving, error)
	Drain(ctx context.Context) error
	Follow(tell func(e control.Event, reason string)) error
	Close() error
}

// sidecarID is the id of the container of an Instance's sidecar.
func sidecarID(instance string) string { return instance + ".sidecar" }

func (c cgroups) sidecar(instance string) string { return c.below(instance, "sidecar") }

// limitSidecar sets the memory limit of a sidecar that has so many requests at once.
func (c cgroups) limitSidecar(instance string, requests int) error {
	path := filepath.Join(c.root, "memory", c.sidecar(instance), "memory.limit_in_bytes")
	if c.unified() {
		path = filepath.Join(c.root, c.sidecar(instance), "memory.max")
	}
	limit := int64(sidecarBytes) + int64(max(0, requests-sidecarBusy))*connectionBytes
	if err := writeCgroup(path, strconv.FormatInt(limit, 10)); err != nil {
		return fmt.Errorf("limit memory of the sidecar of %s: %w", instance, err)
	}
	return nil
}

// sidecarOf is the directory of the socket of an Instance's sidecar. It is there if the Instance has one.
func (e *Engine) sidecarOf(id string) string { return filepath.Join(e.filesOf(id), "sidecar") }

func (e *Engine) hasSidecar(id string) bool {
	_, err := os.Stat(e.sidecarOf(id))
	return err == nil
}

// sidecarContainer names the container and where its files are.
func (e *Engine) sidecarContainer(id string) container {
	output := e.outputTo(filepath.Join(e.filesOf(id), "sidecar"+logSuffix), holder{})
	return container{ID: sidecarID(id), Output: output, Control: e.sidecarOf(id)}
}

// sidecarSpec is the Function's less all that a program needs not which only forwards: no capability, no user, no file but its
// socket. It has a cgroup of its own, so that it goes on when the Function is frozen.
func (e *Engine) sidecarSpec(ctx context.Context, i *instance, box sandbox) (*specs.Spec, error) {
	s, err := e.spec(ctx, i, box)
	if err != nil {
		return nil, err
	}
	score, limit := sidecarOOMScore, int64(sidecarBytes)
	s.Process.Args = []string{sidecarProgram, sidecarControl + "/" + control.Socket}
	s.Process.Capabilities = &specs.LinuxCapabilities{}
	s.Process.User = specs.User{UID: sidecarUser, GID: sidecarUser}
	s.Process.OOMScoreAdj = &score
	s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination != "/proc" && m.Destination != "/dev" })
	s.Mounts = append(s.Mounts, specs.Mount{
		Destination: sidecarControl, Type: "bind", Source: e.sidecarOf(i.id), Options: []string{"bind", "rprivate", "rw", "nosuid", "nodev", "noexec"},
	})
	s.Linux.CgroupsPath = runcPath(e.cgroups.sidecar(i.id))
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	s.Linux.Seccomp = seccompProfile(s)
	return s, nil
}

// besideSidecar makes an Instance's sidecar, if they have any, while do does something else.
func (e *Engine) besideSidecar(ctx context.Context, i *instance, box sandbox, do func(context.Context) error) error {
	if e.cfg.Sidecar == "" {
		return do(ctx)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return do(ctx) })
	group.Go(func() error {
		made, err := e.makeSidecar(ctx, i, box)
		if err != nil {
			return err
		}
		i.mu.Lock()
		i.sidecar = made
		i.mu.Unlock()
		e.followSidecar(i, made)
		return nil
	})
	return group.Wait()
}

func (e *Engine) makeSidecar(ctx context.Context, i *instance, box sandbox) (sidecar, error) {
	id := i.id
	dir := e.sidecarOf(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("sidecar of instance %s: %w", id, err)
	}
	if err := os.Chown(dir, sidecarUser, sidecarUser); err != nil {
		return nil, fmt.Errorf("sidecar of instance %s: %w", id, err)
	}
	c := e.sidecarContainer(id)
	c.Sandbox, c.Labels = box, map[string]string{labelNode: e.cfg.Node, labelInstance: id}
	var err error
	if c.Spec, err = e.sidecarSpec(ctx, i, box); err != nil {
		return nil, err
	}
	return e.backend.CreateSidecar(ctx, c)
}

// adoptSidecar finds the sidecar of an Instance that a former engine made: one that serves function, or nothing if that is empty.
func (e *Engine) adoptSidecar(ctx context.Context, i *instance, function string) error {
	if !e.hasSidecar(i.id) {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, greetTime)
	defer cancel()
	found, err := e.backend.FindSidecar(bounded, e.sidecarContainer(i.id))
	if bounded.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("its sidecar says nothing within %s", greetTime) // no kind of containerd's: one that hangs holds up no other
	}
	if err != nil {
		return err
	}
	i.sidecar = found
	st := found.Status()
	e.log.Debug("sidecar found again", "instance", i.id, "ready", st.Ready, "in_flight", st.InFlight)
	if st.Function != function || st.Serving != (function != "") {
		return fmt.Errorf("its sidecar serves %q (%t), not %q", st.Function, st.Serving, function)
	}
	return nil
}

// followSidecar hears what an Instance's sidecar tells. One that ends has ended the Instance: a sidecar is as easily
// made again as the rest of it, and nothing can be mistaken for what it was.
func (e *Engine) followSidecar(i *instance, made sidecar) {
	begun := e.spawn(func(ctx context.Context) {
		defer context.AfterFunc(ctx, func() { _ = made.Close() })() // it is told to nobody
		err := made.Follow(func(event control.Event, reason string) { e.sidecarTold(i, event, reason) })
		if err != nil && ctx.Err() == nil {
			e.log.Warn("sidecar ended", "instance", i.id, "error", err)
			e.end(i, hearthv1.State_STATE_GONE, 0)
		}
	})
	if !begun {
		_ = made.Close() // the engine stops; the next one finds it again
	}
}

func (e *Engine) sidecarTold(i *instance, event control.Event, reason string) {
	switch event {
	case control.Ready:
		i.readyOnce.Do(func() { close(i.ready) })
	case control.Refused:
		i.mu.Lock()
		serving := i.state == hearthv1.State_STATE_SERVING
		i.mu.Unlock()
		if serving {
			e.log.Warn("function accepts no connections any more", "instance", i.id, "reason", reason)
			e.end(i, hearthv1.State_STATE_GONE, 0)
		}
	}
}

// serve has the Instance's sidecar take requests for the Function, before that is there: nobody else gets the port. One that was
// frozen is told the same again. The Instance's address then is the sidecar's; without one it is the Function's.
func (e *Engine) serve(ctx context.Context, i *instance, r *hearthv1.Revision) error {
	i.mu.Lock()
	side, box, at := i.sidecar, i.sandbox, i.endpoint()
	i.mu.Unlock()
	if side != nil {
		s := sidecarServe(box.IP, r)
		if requests := s.Concurrency + s.Queue; requests > sidecarBusy {
			if err := e.cgroups.limitSidecar(i.id, requests); err != nil {
				return err
			}
		}
		serving, err := side.Serve(ctx, s)
		if err != nil {
			return err
		}
		at = serving.Listen
	}
	i.mu.Lock()
	i.address = at.String()
	i.mu.Unlock()
	return nil
}

// sidecarServe is what a sidecar is told. The Function may listen on every address or on loopback alone.
func sidecarServe(ip netip.Addr, r *hearthv1.Revision) control.Serve {
	port := uint16(r.GetPort())
	at := sidecarAddress(ip, r)
	s := control.Serve{
		Function: r.GetName(), Listen: at, Probe: netip.AddrPortFrom(ip, at.Port()+1), Concurrency: int(r.GetConcurrency()), Queue: sidecarQueue,
	}
	if s.Concurrency <= 0 {
		s.Concurrency = sidecarMost
	}
	for _, host := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback(), ip} {
		s.Targets = append(s.Targets, netip.AddrPortFrom(host, port))
	}
	return s
}

// sidecarAddress is where a sidecar takes a Revision's requests.
func sidecarAddress(ip netip.Addr, r *hearthv1.Revision) netip.AddrPort {
	port := uint16(sidecarPort)
	if p := uint16(r.GetPort()); p == port || p == port+1 {
		port += 2
	}
	return netip.AddrPortFrom(ip, port)
}

// drain has the sidecar of an Instance that serves take no more requests, and waits for those that it has, at most grace. It
// returns what is left of grace.
func (e *Engine) drain(ctx context.Context, i *instance, grace time.Duration) time.Duration {
	i.mu.Lock()
	side := i.sidecar
	i.mu.Unlock()
	if side == nil || grace == 0 {
		return grace
	}
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if err := side.Drain(ctx); err != nil {
		e.log.Warn("sidecar not drained", "instance", i.id, "error", err)
	}
	return max(grace-time.Since(begin), 0)
}

// CreateSidecar implements sidecars.
func (n *node) CreateSidecar(ctx context.Context, c container) (sidecar, error) {
	if _, err := n.runTask(ctx, c); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, launcherTime)
	defer cancel()
	for delay := 2 * time.Millisecond; ; delay = min(2*delay, 50*time.Millisecond) {
		found, err := n.FindSidecar(ctx, c)
		if err == nil || !sleep(ctx, delay) {
			return found, err
		}
	}
}

// FindSidecar implements sidecars.
func (n *node) FindSidecar(ctx context.Context, c container) (sidecar, error) {
	conn, err := dialIn(ctx, c.Control, control.Socket)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	client, err := control.NewClient(ctx, conn)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("container %s: %w", c.ID, err), errdefs.ErrFailedPrecondition)
	}
	return client, nil
}
