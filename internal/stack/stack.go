package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hearth-serverless/hearth/internal/host"
)

const importTime = time.Minute // for the pause image

// supervisor is a running deployment.
type supervisor struct {
	cfg     Config
	specs   map[string]spec
	status  *board
	running map[string]*running
}

// running is a child that is kept.
type running struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// Run brings a deployment up, calls ready once everything serves, keeps it so until ctx is done, and takes it down again: no
// process, mount, namespace, cgroup or link of it is left when Run returns; data is. Clearing up takes at most a minute or two.
// An error says why it did not come up (ErrRunning: it was up), or what could not be cleared.
func Run(ctx context.Context, c Config, ready func(*Status)) error {
	c, err := c.WithDefaults()
	if err != nil {
		return err
	}
	held, err := c.lock(ctx, lookTime)
	if err != nil {
		return err
	}
	defer held.release()
	if err := c.clear(ctx); err != nil {
		return fmt.Errorf("clear what an earlier run left: %w", err)
	}
	err = c.runLocked(ctx, ready)
	c.Progress("clearing up")
	if left := c.clear(ctx); left != nil {
		err = errors.Join(err, fmt.Errorf("clear up: %w", left))
	}
	removeRun(c)
	return err
}

func (c Config) runLocked(ctx context.Context, ready func(*Status)) error {
	if err := c.preflight(ctx); err != nil {
		return err
	}
	c, taken, err := c.takePorts()
	if err != nil {
		return err
	}
	defer taken.release()
	if c, err = c.prepare(); err != nil {
		return err
	}
	s := newSupervisor(ctx, c)
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var writer sync.WaitGroup
	writer.Go(func() { s.status.run(background, c.Logger) })
	defer writer.Wait()
	defer cancel()
	err = s.bringUp(ctx)
	if err == nil {
		s.status.change(func(st *Status) { st.State = StateUp })
		st := s.status.snapshot()
		c.Progress("ready")
		if ready != nil {
			ready(&st)
		}
		<-ctx.Done()
	}
	s.status.change(func(st *Status) { st.State = StateStopping })
	s.takeDown(ctx)
	if ctx.Err() != nil {
		return nil // the end that was asked for
	}
	return err
}

// prepare chooses the subnet if that is left open, and makes the folders and configurations.
func (c Config) prepare() (Config, error) {
	taken, err := host.Subnets()
	if err != nil {
		return c, err
	}
	p := c.paths()
	if c.Subnet, err = chooseSubnet(c.Subnet, p.lastSubnet(), c.Name, taken); err != nil {
		return c, err
	}
	for _, dir := range []string{p.containerdRoot(), p.snapshotterRoot(), p.nodeRoot(), p.logDir(), p.shimSockets(), p.leases(), c.HostsDir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return c, fmt.Errorf("make folder: %w", err)
		}
	}
	if err := os.WriteFile(p.subnetFile(), []byte(c.Subnet.String()+"\n"), 0o600); err != nil {
		return c, fmt.Errorf("remember the subnet: %w", err)
	}
	if err := os.WriteFile(p.pid(), []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600); err != nil {
		return c, fmt.Errorf("write pid file: %w", err)
	}
	return c, c.writeConfigs()
}

func newSupervisor(ctx context.Context, c Config) *supervisor {
	status := Status{
		Name: c.Name, State: StateStarting, PID: os.Getpid(), Started: time.Now(), Root: c.Root, Run: c.Run,
		Gateway: "http://" + c.GatewayAddress, Subnet: c.Subnet.String(), PoolSize: c.PoolSize, Containerd: c.containerdVersion(ctx),
	}
	if c.Registry {
		status.Registry = c.RegistryAddress
	}
	return &supervisor{cfg: c, specs: c.specs(os.Environ()), status: newBoard(c.paths().status(), status), running: map[string]*running{}}
}

// containerdVersion is the third word of "containerd github.com/containerd/containerd/v2 v2.4.2 COMMIT".
func (c Config) containerdVersion(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, filepath.Join(c.Tools, nameContainerd), "--version").Output()
	if words := strings.Fields(string(out)); err == nil && len(words) > 2 {
		return words[2]
	}
	return "unknown"
}

// bringUp starts the children in order. nodeagent comes before containerd, which asks the snapshotter for its snapshots as soon
// as it starts, but is ready only after it.
func (s *supervisor) bringUp(ctx context.Context) error {
	if s.cfg.Registry {
		s.launch(ctx, nameRegistry)
	}
	s.launch(ctx, nameNodeagent)
	s.awaitSnapshotter(ctx)
	s.launch(ctx, nameContainerd)
	if err := s.await(ctx, s.specs[nameContainerd]); err != nil {
		return err
	}
	if err := s.importPause(ctx); err != nil {
		return err
	}
	order := []string{nameNodeagent, namePoolmanager, nameGateway}
	if s.cfg.Registry {
		order = append(order, nameRegistry)
	}
	for _, name := range order {
		s.launch(ctx, name)
		if err := s.await(ctx, s.specs[name]); err != nil {
			return err
		}
	}
	return nil
}

// launch starts to keep a child, unless it is kept already. Not ctx but halt ends it, so that there is an order.
func (s *supervisor) launch(ctx context.Context, name string) {
	if s.running[name] != nil {
		return
	}
	d := s.specs[name]
	s.cfg.Progress("starting " + name)
	s.status.add(Daemon{Name: name, Log: d.cmd.log, Admin: d.admin})
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	k := &keeper{name: name, start: d.cmd.start, grace: d.grace, log: s.cfg.Logger, report: s.status.report}
	r := &running{cancel: cancel, done: make(chan struct{})}
	s.running[name] = r
	go func() {
		defer close(r.done)
		k.run(ctx)
	}()
}

// halt ends a child and waits for it.
func (s *supervisor) halt(name string) {
	r := s.running[name]
	if r == nil {
		return
	}
	s.cfg.Progress("stopping " + name)
	r.cancel()
	<-r.done
}

// takeDown ends the children in order. poolmanager goes before Instances do, or it would make new ones.
func (s *supervisor) takeDown(ctx context.Context) {
	s.halt(nameGateway)
	s.halt(namePoolmanager)
	if s.running[nameNodeagent] != nil && s.running[nameContainerd] != nil {
		s.cfg.Progress("ending instances")
		if err := discardAll(context.WithoutCancel(ctx), s.cfg.paths().nodeSocket()); err != nil {
			s.cfg.Logger.Warn("instances are left for clearing up", "err", err)
		}
	}
	for _, name := range []string{nameNodeagent, nameContainerd, nameRegistry} {
		s.halt(name)
	}
}

// awaitSnapshotter gives nodeagent a moment to serve the snapshotter. If it does not, containerd tries again later.
func (s *supervisor) awaitSnapshotter(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	listens := probeDial("unix", s.cfg.paths().snapshotterSocket())
	for listens(ctx) != nil && s.status.restarts(nameNodeagent) == 0 && host.Pause(ctx, probePause) {
	}
}

func (s *supervisor) importPause(ctx context.Context) error {
	s.cfg.Progress("importing the pause image")
	ctx, cancel := context.WithTimeout(ctx, importTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(s.cfg.Tools, "ctr"), "--address", s.cfg.paths().containerdSocket(), "--namespace", "k8s.io",
		"images", "import", "--snapshotter", "hearth", s.cfg.PauseImage)
	cmd.Env = s.specs[nameContainerd].cmd.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("import pause image %s: %w: %s", s.cfg.PauseImage, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// removeRun removes the Run folder if nothing of others is in it.
func removeRun(c Config) {
	_ = os.Remove(c.paths().lock())
	_ = os.Remove(c.Run)
}
