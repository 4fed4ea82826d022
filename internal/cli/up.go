package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// upOptions are the flags of up; stack.Config explains them.
type upOptions struct {
	config     stack.Config
	subnet     string
	foreground bool
	progressFD int
}

const upLong = `Brings up Hearth on this machine: a private containerd, nodeagent, poolmanager, the gateway, and with --registry a registry.
It runs in the background until "hearth down"; with --foreground until Ctrl-C. A daemon that ends is started again.

Data is kept in --root, sockets are in --run; nothing else on the machine is changed, and "hearth down" leaves nothing running.`

const upExample = `  sudo hearth up --tools .cache/tools/current
  sudo hearth up --registry --pool-size 4
  sudo hearth up --foreground --name two --root /var/lib/two --run /run/two --gateway-address 127.0.0.1:8081`

func (a *app) up() *cobra.Command {
	o := &upOptions{}
	c := &cobra.Command{
		Annotations: map[string]string{onMachine: "a cluster has `hearth install`"},
		Use:         "up", Short: "Bring Hearth up on this machine", Long: upLong, Example: upExample, Args: takes(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.complete(a.run); err != nil {
				return err
			}
			if o.foreground {
				return a.upForeground(c.Context(), o)
			}
			return a.upDetached(c.Context(), o)
		},
	}
	o.add(c.Flags())
	return c
}

func (o *upOptions) add(f *pflag.FlagSet) {
	f.BoolVar(&o.foreground, "foreground", false, "stay until interrupted instead of running in the background")
	f.StringVar(&o.config.Name, "name", stack.DefaultName, "name of the deployment; two on one machine want two names")
	f.StringVar(&o.config.Root, "root", stack.DefaultRoot, "folder of the data")
	f.StringVar(&o.config.Tools, "tools", "", "folder of containerd, runc and so on (default: where this command is, or tools beside it)")
	f.StringVar(&o.config.Bin, "bin", "", "folder of nodeagent, poolmanager, gateway and so on (default: where this command is)")
	f.StringVar(&o.config.PauseImage, "pause-image", "", "archive of the pause image (default: pause.tar in --bin)")
	f.StringVar(&o.config.GatewayAddress, "gateway-address", stack.DefaultGatewayAddress, "HOST:PORT of the gateway, on loopback; port 0 takes a free one")
	f.BoolVar(&o.config.Registry, "registry", false, "run a private registry as well")
	f.StringVar(&o.config.RegistryAddress, "registry-address", stack.DefaultRegistryAddress, "HOST:PORT of that registry, on loopback; port 0 takes a free one")
	f.StringVar(&o.config.HostsDir, "hosts-dir", "", "folder of hosts.toml files for registries (default: certs.d in --root)")
	f.IntVar(&o.config.PoolSize, "pool-size", stack.DefaultPoolSize, "sandboxes to keep warm; 0 for none")
	f.BoolVar(&o.config.Sidecar, "sidecar", false, "give each instance a sidecar, which holds its function's concurrency limit and drains it")
	f.StringVar(&o.subnet, "subnet", "", "IPv4 network for instances, like 10.200.0.0/20 (default: a free one)")
	f.BoolVar(&o.config.LocalPull, "local-pull", false, "let containerd's CRI pull by its older path")
	f.StringVar(&o.config.LogLevel, "log-level", "info", "of the daemons: debug, info, warn or error")
	f.IntVar(&o.progressFD, "progress-fd", 0, "")
	_ = f.MarkHidden("progress-fd")
}

// complete fills in what depends on other flags, and makes paths absolute: the background has another working directory.
func (o *upOptions) complete(run string) error {
	o.config.Run = run
	if o.config.PoolSize == 0 {
		o.config.PoolSize = -1
	}
	if o.subnet != "" {
		subnet, err := netip.ParsePrefix(o.subnet)
		if err != nil {
			return usagef("--subnet %q: want a network like 10.200.0.0/20", o.subnet)
		}
		o.config.Subnet = subnet
	}
	if o.config.Tools == "" {
		o.config.Tools = findTools()
	}
	for _, path := range []*string{&o.config.Root, &o.config.Run, &o.config.Tools, &o.config.Bin, &o.config.PauseImage, &o.config.HostsDir} {
		if *path == "" {
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return fmt.Errorf("folder %s: %w", *path, err)
		}
		*path = abs
	}
	if _, err := o.config.WithDefaults(); err != nil {
		return usageError{err}
	}
	return nil
}

// findTools looks where an installation and where a checkout have them.
func findTools() string {
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	bin := filepath.Dir(self)
	for _, dir := range []string{bin, filepath.Join(bin, "tools"), filepath.Join(bin, "../.cache/tools/current")} {
		if _, err := os.Stat(filepath.Join(dir, "containerd")); err == nil {
			return dir
		}
	}
	return ""
}

// event is a line that the supervisor in the background writes for the command that waits for it.
type event struct {
	Progress string `json:"progress,omitempty"`
	Error    string `json:"error,omitempty"`
	Ready    bool   `json:"ready,omitempty"`
}

// upForeground is the supervisor.
func (a *app) upForeground(ctx context.Context, o *upOptions) error {
	log, err := daemon.NewLogger(a.err, o.config.LogLevel, "text")
	if err != nil {
		return usageError{err}
	}
	o.config.Logger = log
	tell := a.teller(o.progressFD)
	o.config.Progress = func(line string) { tell(event{Progress: line}) }
	err = stack.Run(ctx, o.config, func(s *stack.Status) {
		tell(event{Ready: true})
		if o.progressFD == 0 {
			_ = a.printUp(s)
		}
	})
	if err != nil {
		tell(event{Error: err.Error()})
		return err
	}
	return nil
}

// teller writes events as lines for people, or as JSON for the command in the foreground.
func (a *app) teller(fd int) func(event) {
	if fd == 0 {
		clock := stopwatch(time.Now())
		return func(e event) {
			if e.Progress != "" {
				a.note("%s  %s", clock(), e.Progress)
			}
		}
	}
	// The waiting command goes away once all is ready: then there is nobody to tell, and that is no error.
	syscall.CloseOnExec(fd)
	lines := json.NewEncoder(os.NewFile(uintptr(fd), "progress"))
	return func(e event) { _ = lines.Encode(e) }
}

func stopwatch(start time.Time) func() string {
	return func() string { return fmt.Sprintf("%6.1f s", time.Since(start).Seconds()) }
}

// upDetached starts the supervisor in a session of its own and shows its progress until it is ready.
func (a *app) upDetached(ctx context.Context, o *upOptions) error {
	cmd, lines, err := a.startSupervisor(o)
	if err != nil {
		return fmt.Errorf("start the supervisor: %w", err)
	}
	defer lines.Close()
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	ready, problem := a.follow(lines)
	if ready {
		if err := cmd.Process.Release(); err != nil {
			return fmt.Errorf("leave the supervisor alone: %w", err)
		}
		status, err := stack.ReadStatus(o.config.Run)
		if err != nil {
			return err
		}
		return a.printUp(status)
	}
	ended := cmd.Wait()
	if ctx.Err() != nil {
		return fmt.Errorf("bring up: %w", context.Canceled)
	}
	if problem == "" {
		problem = fmt.Sprintf("the supervisor ended early (%v); see %s", ended, supervisorLog(o))
	}
	return errors.New(problem)
}

func supervisorLog(o *upOptions) string {
	return filepath.Join(stack.LogDir(o.config.Root), "hearth.log")
}

func (a *app) startSupervisor(o *upOptions) (*exec.Cmd, io.ReadCloser, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	if err := os.MkdirAll(filepath.Dir(supervisorLog(o)), 0o711); err != nil {
		return nil, nil, err
	}
	log, err := os.OpenFile(supervisorLog(o), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, nil, err
	}
	defer log.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer write.Close()
	args := append([]string{self}, a.args...)
	// No context bounds its life: it outlives this command.
	cmd := &exec.Cmd{
		Path: self, Args: append(args, "--foreground", "--progress-fd", "3"), Stdout: log, Stderr: log, ExtraFiles: []*os.File{write},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, errors.Join(err, read.Close())
	}
	return cmd, read, nil
}

// follow shows events until the supervisor is ready or ends, and then says which, and why.
func (a *app) follow(lines io.Reader) (ready bool, problem string) {
	clock := stopwatch(time.Now())
	in := bufio.NewScanner(lines)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var e event
		if json.Unmarshal(in.Bytes(), &e) != nil {
			continue
		}
		switch {
		case e.Ready:
			return true, ""
		case e.Error != "":
			problem = e.Error
		default:
			a.note("%s  %s", clock(), e.Progress)
		}
	}
	return false, problem
}

func (a *app) printUp(s *stack.Status) error {
	text := fmt.Sprintf("Hearth is up: functions are at %s/fn/NAME\n", s.Gateway)
	if s.Registry != "" {
		text += fmt.Sprintf("The registry is at %s; push images to %s/NAME:TAG\n", s.Registry, s.Registry)
	}
	flag := ""
	if s.Run != stack.DefaultRun {
		flag = " --run " + s.Run
	}
	text += fmt.Sprintf("Next: hearth deploy NAME --image REF%s, then hearth invoke NAME%s; the end of it: hearth down%s\n", flag, flag, flag)
	text += fmt.Sprintf("Code wants a runtime: hearth runtime apply NAME --image REF%s, then hearth deploy NAME DIR%s\n", flag, flag)
	return a.printf("%s", text)
}
