package stack

import (
	"context"
	"log/slog"
	"net/netip"
	"time"
)

// What the tests reach inside for: pure parts with many cases, and the keeper with children that are no processes.
var (
	ChooseSubnet      = chooseSubnet
	MasqueradeBackend = masqueradeBackend
	CheckKernel       = checkKernel
)

// Rendered is what writeConfigs would write: containerd's, the network's and the registry's configuration.
func (c Config) Rendered(templates []string, masquerade string, apparmor bool) ([]string, error) {
	var out []string
	for _, t := range templates {
		text, err := render(t, c.values(masquerade, apparmor))
		if err != nil {
			return nil, err
		}
		out = append(out, text)
	}
	return out, nil
}

// Clear is clear, Preflight preflight, ChildEnv childEnv.
func (c Config) Clear(ctx context.Context) error    { return c.clear(ctx) }
func (c Config) Preflight() error                   { return c.preflight(context.Background()) }
func (c Config) ChildEnv(environ []string) []string { return c.childEnv(environ) }
func (c Config) RememberSubnet() (path string)      { return c.paths().subnetFile() }
func LastSubnet(root string) netip.Prefix           { return paths{root: root}.lastSubnet() }
func (c Config) LockForTest() (release func(), err error) {
	l, err := c.lock(context.Background(), 0)
	if err != nil {
		return nil, err
	}
	return l.release, nil
}

// LockRootForTest holds the last but one of the locks that a supervisor lets go of.
func (c Config) LockRootForTest() (release func(), err error) {
	f, err := lockFile(c.paths().rootLock())
	return func() { _ = f.Close() }, err
}

// TakePorts is takePorts.
func (c Config) TakePorts() (taken Config, release func(), err error) {
	taken, p, err := c.takePorts()
	if err != nil {
		return c, nil, err
	}
	return taken, p.release, nil
}

// FakeChild is a child of Keep.
type FakeChild struct {
	Ended   chan error
	Stopped func()
	Killed  func()
}

func (f FakeChild) pid() int    { return 7 }
func (f FakeChild) wait() error { return <-f.Ended }
func (f FakeChild) stop()       { f.Stopped() }
func (f FakeChild) kill()       { f.Killed() }

// Keep runs a keeper of fake children.
func Keep(ctx context.Context, start func() (FakeChild, error), grace time.Duration, report func(string, int, error)) {
	k := &keeper{
		name: "fake", grace: grace, log: slog.New(slog.DiscardHandler), report: report,
		start: func() (child, error) { return start() },
	}
	k.run(ctx)
}

// Command starts a real child as the supervisor does.
func Command(program string, args, env []string, log string) (pid int, wait func() error, err error) {
	c, err := command{program, args, env, log}.start()
	if err != nil {
		return 0, nil, err
	}
	return c.pid(), c.wait, nil
}
