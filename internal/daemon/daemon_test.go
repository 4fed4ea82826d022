package daemon_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

func service(run func(context.Context, *daemon.Runtime) error) daemon.Service {
	return daemon.Service{Name: "thing", Short: "a thing", Run: run, Flags: func(f *pflag.FlagSet) { f.Int("n", 1, "a number") }}
}

func process(args ...string) (daemon.Process, *bytes.Buffer, chan os.Signal) {
	out := &bytes.Buffer{}
	signals := make(chan os.Signal, 2)
	return daemon.Process{Args: args, LookupEnv: env(nil), Stdout: out, Stderr: out, Signals: signals, Exit: func(int) {}}, out, signals
}

func TestExitCodes(t *testing.T) {
	ok := func(context.Context, *daemon.Runtime) error { return nil }
	for _, c := range []struct {
		name string
		run  func(context.Context, *daemon.Runtime) error
		args []string
		code int
		says string
	}{
		{"ends well", ok, nil, daemon.ExitOK, "stopped"},
		{"fails", func(context.Context, *daemon.Runtime) error { return errors.New("no luck") }, nil, daemon.ExitFailed, "no luck"},
		{"version", ok, []string{"--version"}, daemon.ExitOK, daemon.Version()},
		{"help", ok, []string{"--help"}, daemon.ExitOK, "--admin-address"},
		{"unknown flag", ok, []string{"--nope"}, daemon.ExitUsage, "--nope"},
		{"argument", ok, []string{"extra"}, daemon.ExitUsage, "extra"},
		{"public admin address", ok, []string{"--admin-address=0.0.0.0:0"}, daemon.ExitUsage, "not loopback"},
		{"odd admin address", ok, []string{"--admin-address=localhost"}, daemon.ExitUsage, "HOST:PORT"},
		{"odd metrics address", ok, []string{"--metrics-address=7445"}, daemon.ExitUsage, "--metrics-address"},
		{"log level", ok, []string{"--log-level=loud"}, daemon.ExitUsage, "loud"},
		{"log format", ok, []string{"--log-format=xml"}, daemon.ExitUsage, "xml"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, out, _ := process(c.args...)
			if code := daemon.Execute(t.Context(), service(c.run), p); code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			if !strings.Contains(out.String(), c.says) {
				t.Errorf("does not say %q: %s", c.says, out)
			}
		})
	}
}

// codedError has an exit code of its own.
type codedError int

func (e codedError) Error() string { return "refused" }
func (e codedError) ExitCode() int { return int(e) }

func TestCommands(t *testing.T) {
	var word string
	command := func(run func(context.Context) error) daemon.Service {
		s := service(func(context.Context, *daemon.Runtime) error { t.Error("the daemon itself ran"); return nil })
		s.Commands = []daemon.Command{{
			Name: "once", Short: "do it", Flags: func(f *pflag.FlagSet) { f.StringVar(&word, "the-word", "default", "") },
			Run: func(ctx context.Context, out io.Writer) error {
				_, _ = io.WriteString(out, "doing it with "+word+"\n")
				return run(ctx)
			},
		}}
		return s
	}
	for _, c := range []struct {
		name string
		err  error
		args []string
		env  map[string]string
		code int
		says string
	}{
		{"ends well", nil, []string{"once", "--the-word=flag"}, map[string]string{"HEARTH_THE_WORD": "env"}, daemon.ExitOK, "doing it with flag"},
		{"environment", nil, []string{"once"}, map[string]string{"HEARTH_THE_WORD": "env"}, daemon.ExitOK, "doing it with env"},
		{"fails", errors.New("no luck"), []string{"once"}, nil, daemon.ExitFailed, "thing once: no luck"},
		{"has a code", fmt.Errorf("do it: %w", codedError(7)), []string{"once"}, nil, 7, "thing once: do it: refused"},
		{"unknown flag", nil, []string{"once", "--nope"}, nil, daemon.ExitUsage, "See thing once --help"},
		{"argument", nil, []string{"once", "more"}, nil, daemon.ExitUsage, "more"},
		{"unknown command", nil, []string{"twice"}, nil, daemon.ExitUsage, "twice"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, out, _ := process(c.args...)
			p.LookupEnv = env(c.env)
			if code := daemon.Execute(t.Context(), command(func(context.Context) error { return c.err }), p); code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			if !strings.Contains(out.String(), c.says) {
				t.Errorf("does not say %q: %s", c.says, out)
			}
		})
	}
	p, _, signals := process("once")
	signals <- syscall.SIGTERM
	wait := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	if code := daemon.Execute(t.Context(), command(wait), p); code != daemon.ExitFailed {
		t.Errorf("exit code %d after a signal", code)
	}
}

func TestSignalStopsRun(t *testing.T) {
	p, out, signals := process("--log-format=json")
	run := func(ctx context.Context, rt *daemon.Runtime) error {
		rt.Ready.Set("a", nil)
		signals <- syscall.SIGTERM
		<-ctx.Done()
		if rt.Ready.Err() == nil {
			t.Error("still ready while shutting down")
		}
		return ctx.Err()
	}
	if code := daemon.Execute(t.Context(), service(run), p); code != daemon.ExitOK {
		t.Errorf("exit code %d: %s", code, out)
	}
}

func TestSecondSignalExitsAtOnce(t *testing.T) {
	p, _, signals := process()
	exited := make(chan int, 1)
	p.Exit = func(code int) { exited <- code }
	run := func(ctx context.Context, _ *daemon.Runtime) error {
		signals <- syscall.SIGINT
		<-ctx.Done()
		signals <- syscall.SIGINT
		if code := <-exited; code != daemon.ExitInterrupted {
			t.Errorf("exit code %d", code)
		}
		return nil
	}
	daemon.Execute(t.Context(), service(run), p)
}

func TestShutdownIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _, signals := process()
		release := make(chan struct{})
		signals <- syscall.SIGTERM
		rt := &daemon.Runtime{Log: slog.New(slog.DiscardHandler), Ready: &daemon.Readiness{}}
		err := daemon.Supervise(t.Context(), service(func(context.Context, *daemon.Runtime) error { <-release; return nil }), rt, p)
		if err == nil || !strings.Contains(err.Error(), "longer than 30s") {
			t.Errorf("got %v", err)
		}
		close(release)
	})
}

func TestAdminListener(t *testing.T) {
	p, out, _ := process()
	run := func(_ context.Context, rt *daemon.Runtime) error {
		url := "http://" + rt.Admin
		expect(t, http.DefaultClient, url+"/healthz", 200, "ok")
		expect(t, http.DefaultClient, url+"/readyz", 503, "starting")
		rt.Ready.Set("store", nil)
		rt.Ready.Set("node", errors.New("not connected"))
		expect(t, http.DefaultClient, url+"/readyz", 503, "node: not connected")
		expect(t, http.DefaultClient, url+"/readyz?verbose", 503, `"node":{"ready":false,"reason":"not connected"}`)
		rt.Ready.Set("node", nil)
		expect(t, http.DefaultClient, url+"/readyz", 200, "ready")
		expect(t, http.DefaultClient, url+"/metrics", 200, "hearth_build_info")
		expect(t, http.DefaultClient, url+"/debug/pprof/cmdline", 200, "")
		return nil
	}
	if code := daemon.Execute(t.Context(), service(run), p); code != 0 {
		t.Errorf("exit code %d: %s", code, out)
	}
	if !strings.Contains(out.String(), "admin=127.0.0.1:") {
		t.Errorf("log does not tell the address: %s", out)
	}
}

// TestMetricsListener shows how the daemon does, and nothing else.
func TestMetricsListener(t *testing.T) {
	p, out, _ := process("--metrics-address=:0")
	run := func(_ context.Context, rt *daemon.Runtime) error {
		_, port, err := net.SplitHostPort(rt.Metrics)
		if err != nil {
			return err
		}
		url := "http://127.0.0.1:" + port
		expect(t, http.DefaultClient, url+"/healthz", 200, "ok")
		expect(t, http.DefaultClient, url+"/readyz", 503, "starting")
		expect(t, http.DefaultClient, url+"/metrics", 200, "hearth_build_info")
		expect(t, http.DefaultClient, url+"/debug/pprof/cmdline", 404, "")
		expect(t, http.DefaultClient, "http://"+rt.Admin+"/metrics", 200, "hearth_build_info")
		return nil
	}
	if code := daemon.Execute(t.Context(), service(run), p); code != 0 {
		t.Errorf("exit code %d: %s", code, out)
	}
}

func expect(t *testing.T, c *http.Client, url string, code int, body string) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Error(err)
		return
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != code || !strings.Contains(string(data), body) {
		t.Errorf("%s: %d %.300s %v, want %d %q", url, resp.StatusCode, data, err, code, body)
	}
}

func TestReadinessFollows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var r daemon.Readiness
		var asked atomic.Int32
		var well atomic.Bool
		done := make(chan error, 1)
		go func() {
			done <- r.Follow(ctx, "it", func(context.Context) error {
				asked.Add(1)
				if !well.Load() {
					return errors.New("not yet")
				}
				return nil
			})
		}()
		time.Sleep(time.Second)
		synctest.Wait()
		if err := r.Err(); err == nil || asked.Load() < 15 {
			t.Errorf("%v after %d questions", err, asked.Load())
		}
		well.Store(true)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if err := r.Err(); err != nil || asked.Load() > 40 {
			t.Errorf("%v after %d questions", err, asked.Load())
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
