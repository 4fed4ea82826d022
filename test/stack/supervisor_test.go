package stack_test

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/hearth-serverless/hearth/internal/stack"
)

// TestSupervisorKilled kills the supervisor itself. `hearth down` clears up after it, and after the next `hearth up` the
// Functions are there that were deployed before.
func TestSupervisorKilled(t *testing.T) {
	d := &deployment{config: newConfig(t), booted: map[string]int{}}
	t.Cleanup(func() { // whatever fails below
		if err := stack.Down(context.Background(), d.config); err != nil && !errors.Is(err, stack.ErrDown) {
			t.Error(err)
		}
		vanished(t, d.config, d.status)
	})
	supervisor := d.foreground(t)
	d.connect(t)
	d.mustDeploy(t, "kept", d.pushGo(t))
	d.web.answersBy(t, "kept", time.Now().Add(longStart))

	if err := supervisor.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = supervisor.Wait()
	if _, err := stack.ReadStatus(d.config.Run); !errors.Is(err, stack.ErrDown) {
		t.Errorf("status after the supervisor's death: %v", err)
	}
	if left, err := stack.Leftovers(d.config); err != nil || len(left) == 0 {
		t.Errorf("a supervisor that was killed leaves nothing, which this test cannot believe: %v", err)
	}
	d.hearth(t, "down")
	vanished(t, d.config, d.status)

	d.hearth(t, append([]string{"up"}, d.flags()...)...)
	var err error
	if d.status, err = stack.ReadStatus(d.config.Run); err != nil {
		t.Fatal(err)
	}
	d.connect(t)
	d.web.answersBy(t, "kept", time.Now().Add(recovery))
	d.settles(t)
	d.hearth(t, "down")
	vanished(t, d.config, d.status)
}

// flags of `hearth up`, but for --run.
func (d *deployment) flags() []string {
	return []string{
		"--name", d.config.Name, "--root", d.config.Root, "--tools", d.config.Tools, "--bin", d.config.Bin, "--registry",
		"--pause-image", d.config.PauseImage, "--gateway-address", d.config.GatewayAddress, "--registry-address", d.config.RegistryAddress,
	}
}

func (d *deployment) command(args ...string) *exec.Cmd {
	return exec.Command(filepath.Join(shop.bin, "hearth"), append(args, "--run", d.config.Run)...)
}

// hearth runs a command to its end.
func (d *deployment) hearth(t *testing.T, args ...string) {
	t.Helper()
	if out, err := d.command(args...).CombinedOutput(); err != nil {
		t.Fatalf("hearth %s: %v\n%s", args[0], err, out)
	}
}

// foreground starts a supervisor as a child, and waits until all is up. Its registry keeps its port, which images are named by.
func (d *deployment) foreground(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := d.command(append([]string{"up", "--foreground"}, d.flags()...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(longStart); ; time.Sleep(20 * time.Millisecond) {
		s, err := stack.ReadStatus(d.config.Run)
		if err == nil && s.State == stack.StateUp {
			d.status = s
			d.config.RegistryAddress = s.Registry
			return cmd
		}
		if time.Now().After(end) {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			t.Fatalf("hearth up: not ready in time: %v\n%s", err, out.String())
		}
	}
}
