package stack_test

import (
	"context"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// killings is how often nodeagent is killed in the middle of a claim. The supervisor's pauses grow with each.
const killings = 5

// TestKilled kills each daemon as a crash would. Requests to a running Instance notice nothing, unless it was the gateway; soon
// everything serves again; no Instance was claimed twice, and nothing of what was broken off is left.
func TestKilled(t *testing.T) {
	d := start(t)
	image := d.pushGo(t)
	big := push(t, d.status.Registry, "big", withLayers(t, goImage(t), bigLayer(t, 1)))
	d.mustDeploy(t, "steady", image, func(s *hearthv1.FunctionSpec) { s.Scaling.Min = 1 })
	d.mustDeploy(t, "rest", image)
	d.web.answersBy(t, "steady", time.Now().Add(longStart))
	d.settles(t)
	history := newHistory()
	stopWatching := history.watch(d)
	t.Cleanup(stopWatching)

	t.Run("gateway", func(t *testing.T) { d.whileServing(t, true, func(t *testing.T) { d.kill(t, "gateway") }) })
	t.Run("poolmanager", func(t *testing.T) { d.whileServing(t, false, func(t *testing.T) { d.kill(t, "poolmanager") }) })
	t.Run("containerd", func(t *testing.T) { d.whileServing(t, false, func(t *testing.T) { d.kill(t, "containerd") }) })
	t.Run("nodeagent in mid-pull", func(t *testing.T) {
		d.whileServing(t, false, func(t *testing.T) { d.killInMidPull(t, big) })
		d.toZero(t, "big")
		d.settles(t)
	})
	for range killings {
		t.Run("nodeagent in mid-claim", func(t *testing.T) { d.whileServing(t, false, d.killInMidClaim) })
	}
	stopWatching()
	history.check(t, killings)
}

// whileServing does harm while a Function that runs is asked all the time, and checks that all is well again soon.
func (d *deployment) whileServing(t *testing.T, mayBreak bool, harm func(t *testing.T)) {
	busy := d.web.traffic("steady")
	defer busy.stop()
	harm(t)
	end := time.Now().Add(recovery)
	d.web.answersBy(t, "steady", end)
	d.web.answersBy(t, "rest", end)
	d.readyBy(t, end)
	d.toZero(t, "rest")
	d.web.answersBy(t, "rest", end) // from zero, whatever the answer before came from
	busy.check(t, mayBreak)
	d.toZero(t, "rest")
	d.settles(t)
}

// readyBy waits until every daemon says that it is ready.
func (d *deployment) readyBy(t *testing.T, end time.Time) {
	t.Helper()
	ctx, cancel := context.WithDeadline(t.Context(), end)
	defer cancel()
	for {
		s, err := stack.Inspect(ctx, d.config.Run)
		if err == nil && !slices.ContainsFunc(s.Daemons, func(each stack.Daemon) bool { return !each.Ready }) {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("not every daemon is ready in time: %+v %v", s, err)
		}
		nap(ctx, 20*time.Millisecond)
	}
}

// kill ends a daemon with SIGKILL.
func (d *deployment) kill(t *testing.T, name string) {
	t.Helper()
	pid := d.pid(t, name)
	if pid == 0 {
		t.Fatalf("%s does not run", name)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatalf("kill %s: %v", name, err)
	}
}

// killInMidPull kills nodeagent when a layer of an image is being unpacked for a request that waits.
func (d *deployment) killInMidPull(t *testing.T, image string) {
	if err := d.deploy(t, "big", image, false); err != nil {
		t.Fatal(err)
	}
	asked := d.askAside(t, "big")
	for end := time.Now().Add(longStart); ; time.Sleep(time.Millisecond) {
		staged, err := os.ReadDir(d.snapshotterDir("staging"))
		if err != nil {
			t.Fatal(err)
		}
		if len(staged) > 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no pull has begun")
		}
	}
	d.kill(t, "nodeagent") // at once: how long the layer takes is the machine's affair
	end := time.Now().Add(recovery)
	d.web.answersBy(t, "big", end)
	select {
	case err := <-asked:
		t.Logf("the request that waited for the pull: %v", err)
	case <-time.After(time.Until(end)):
		t.Errorf("the request that waited for the pull has no answer within %v", recovery)
	}
}

// killInMidClaim kills nodeagent some moment after a request needs a new Instance.
func (d *deployment) killInMidClaim(t *testing.T) {
	after := time.Duration(rand.IntN(300)) * time.Millisecond
	asked := d.askAside(t, "rest")
	time.Sleep(after)
	d.kill(t, "nodeagent")
	t.Logf("killed after %v", after)
	t.Cleanup(func() { t.Logf("the request under way: %v", <-asked) })
}

// askAside asks a Function and goes on. What becomes of that request is for the log: it may have been lost with the daemon.
func (d *deployment) askAside(t *testing.T, function string) <-chan error {
	asked := make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), longStart)
	go func() {
		defer cancel()
		asked <- d.web.ask(ctx, function)
	}()
	return asked
}
