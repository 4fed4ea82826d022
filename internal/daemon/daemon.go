package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Exit codes of every daemon.
const (
	ExitOK          = 0
	ExitFailed      = 1   // Run returned an error, or did not end in time
	ExitUsage       = 2   // a flag, an environment variable or the file is wrong
	ExitInterrupted = 130 // a second signal came while shutting down
)

// shutdownTime bounds the time from the first signal to the end.
const shutdownTime = 30 * time.Second

// Service is a daemon as its main describes it.
type Service struct {
	Name  string // of the program
	Short string // one line
	Long  string // for --help
	// Flags adds the service's own flags; may be nil. Each may also be set by HEARTH_NAME and in the --config file.
	Flags func(*pflag.FlagSet)
	// Run does the work. It blocks until ctx is done and everything is tidy; it has 30 s for that.
	Run func(ctx context.Context, rt *Runtime) error
	// Commands are what the program can do besides, each named by its first argument.
	Commands []Command
}

// Command is something that a daemon's program does once, and ends.
type Command struct {
	Name, Short, Long string
	// Flags adds the command's flags; may be nil. Each may also be set by HEARTH_NAME.
	Flags func(*pflag.FlagSet)
	// Run says on out what it does. The first signal ends ctx. The exit code is ExitFailed if it returns an error, or what the
	// error's method ExitCode() int says, if it wraps one that has it.
	Run func(ctx context.Context, out io.Writer) error
}

// Runtime is what a running service gets.
type Runtime struct {
	Log      *slog.Logger
	Registry *prometheus.Registry // holds Go's, the process's and hearth_build_info already
	Ready    *Readiness           // not ready until the service has Set something
	Admin    string               // address of the admin listener: HOST:PORT or a socket's path
	Metrics  string               // HOST:PORT of the metrics listener, if there is one
}

// Process is the part of the operating system that Execute sees.
type Process struct {
	Args           []string // without the program's name
	LookupEnv      func(string) (string, bool)
	Stdout, Stderr io.Writer
	Signals        <-chan os.Signal
	Exit           func(code int) // for the second signal; does not return in a real process
}

// Main runs a service in this process and returns its exit code.
func Main(s Service) int {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	return Execute(context.Background(), s, Process{
		Args: os.Args[1:], LookupEnv: os.LookupEnv, Stdout: os.Stdout, Stderr: os.Stderr, Signals: signals, Exit: os.Exit,
	})
}

// Execute is Main with everything that it takes from the process passed in.
func Execute(ctx context.Context, s Service, p Process) int {
	var failed error
	options := &common{}
	command := &cobra.Command{
		Use: s.Name, Short: s.Short, Long: s.Long, Version: Version(),
		Args: cobra.NoArgs, SilenceErrors: true, SilenceUsage: true,
		PreRunE: func(c *cobra.Command, _ []string) error { return Configure(c.Flags(), p.LookupEnv) },
		RunE: func(c *cobra.Command, _ []string) error {
			rt, stop, err := options.start(ctx, s, p.Stderr)
			if err != nil {
				return err
			}
			defer stop()
			failed = supervise(ctx, s, rt, p)
			return nil
		},
	}
	command.CompletionOptions.DisableDefaultCmd = true
	command.SetArgs(p.Args)
	command.SetOut(p.Stdout)
	command.SetErr(p.Stderr)
	options.add(command.Flags())
	if s.Flags != nil {
		s.Flags(command.Flags())
	}
	for _, c := range s.Commands {
		command.AddCommand(c.command(p, &failed))
	}
	if ran, err := command.ExecuteContextC(ctx); err != nil {
		_, _ = fmt.Fprintf(p.Stderr, "%s: %v\nSee %s --help.\n", s.Name, err, ran.CommandPath())
		return ExitUsage
	}
	return exitCode(failed)
}

// command is c for the command line. What Run returns goes to failed.
func (c Command) command(p Process, failed *error) *cobra.Command {
	command := &cobra.Command{
		Use: c.Name, Short: c.Short, Long: c.Long,
		Args: cobra.NoArgs, SilenceErrors: true, SilenceUsage: true,
		PreRunE: func(c *cobra.Command, _ []string) error { return ConfigureFromEnv(c.Flags(), p.LookupEnv) },
		RunE: func(cc *cobra.Command, _ []string) error {
			ctx, cancel := context.WithCancel(cc.Context())
			defer cancel()
			ended := make(chan struct{})
			signalled := make(chan struct{})
			go func() {
				defer close(signalled)
				select {
				case <-p.Signals:
					cancel()
				case <-ended:
				}
			}()
			*failed = c.Run(ctx, p.Stderr)
			close(ended)
			<-signalled
			if *failed != nil {
				_, _ = fmt.Fprintf(p.Stderr, "%s: %v\n", cc.CommandPath(), *failed)
			}
			return nil
		},
	}
	if c.Flags != nil {
		c.Flags(command.Flags())
	}
	return command
}

func exitCode(failed error) int {
	var coded interface{ ExitCode() int }
	switch {
	case failed == nil:
		return ExitOK
	case errors.As(failed, &coded):
		return coded.ExitCode()
	}
	return ExitFailed
}

// common are the flags that every daemon has.
type common struct {
	config, level, format, admin, metrics string
}

func (c *common) add(f *pflag.FlagSet) {
	f.StringVar(&c.config, "config", "", "YAML or JSON file with values of these flags by name; flags and environment win")
	f.StringVar(&c.level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&c.format, "log-format", "text", "text or json")
	f.StringVar(&c.admin, "admin-address", "127.0.0.1:0", "loopback HOST:PORT (port 0 takes a free one) or unix:PATH for /metrics, /healthz, /readyz and /debug/pprof")
	f.StringVar(&c.metrics, "metrics-address", "", "HOST:PORT for /metrics, /healthz and /readyz alone, on any address, without authentication: for the probes of a kubelet and for Prometheus on other machines (default: none)")
}

func (c *common) start(ctx context.Context, s Service, stderr io.Writer) (*Runtime, func(), error) {
	log, err := NewLogger(stderr, c.level, c.format)
	if err != nil {
		return nil, nil, err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), buildInfo())
	l, err := listenAdmin(ctx, c.admin)
	if err != nil {
		return nil, nil, err
	}
	m, err := listenMetrics(ctx, c.metrics)
	if err != nil {
		return nil, nil, errors.Join(err, l.Close())
	}
	rt := &Runtime{Log: log, Registry: registry, Ready: &Readiness{}, Admin: l.Addr().String()}
	handler := metricsHandler(registry, rt.Ready)
	stop := serveBeside(l, adminHandler(handler), log)
	if m != nil {
		stopAdmin, stopMetrics := stop, serveBeside(m, handler, log)
		rt.Metrics, stop = m.Addr().String(), func() { stopMetrics(); stopAdmin() }
	}
	log.Info("starting", "name", s.Name, "version", Version(), "pid", os.Getpid(), "admin", rt.Admin, "metrics", rt.Metrics)
	return rt, stop, nil
}

func buildInfo() prometheus.Collector {
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "hearth_build_info", Help: "Always 1; the labels say what runs."},
		[]string{"version", "go_version"})
	g.WithLabelValues(Version(), runtime.Version()).Set(1)
	return g
}

// supervise runs the service until it ends by itself, or a signal or ctx tells it to and it does, or does not in time.
func supervise(ctx context.Context, s Service, rt *Runtime, p Process) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, rt) }()
	err, stopping := awaitStop(ctx, ended, rt, p)
	if stopping {
		rt.Ready.Set("running", errors.New("shutting down"))
		cancel()
		err = awaitEnd(ended, p)
	}
	if err != nil && !(stopping && errors.Is(err, context.Canceled)) {
		rt.Log.Error("stopped", "err", err)
		return err
	}
	rt.Log.Info("stopped")
	return nil
}

func awaitStop(ctx context.Context, ended <-chan error, rt *Runtime, p Process) (err error, stopping bool) {
	select {
	case err := <-ended:
		return err, false
	case sig := <-p.Signals:
		rt.Log.Info("stopping", "signal", sig.String())
	case <-ctx.Done():
		rt.Log.Info("stopping")
	}
	return nil, true
}

func awaitEnd(ended <-chan error, p Process) error {
	late := time.NewTimer(shutdownTime)
	defer late.Stop()
	for {
		select {
		case err := <-ended:
			return err
		case <-p.Signals:
			p.Exit(ExitInterrupted)
		case <-late.C:
			return fmt.Errorf("shutdown took longer than %s", shutdownTime)
		}
	}
}
