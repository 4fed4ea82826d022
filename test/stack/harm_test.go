package stack_test

import (
	"context"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// hostileMemoryBytes is what the hostile Function may have.
	hostileMemoryBytes = 96 << 20
	// maxHarmBytes is how much of the disk a hostile Function may take at any time: a log, and what its neighbours' starts take.
	maxHarmBytes = 128 << 20
)

// harm is what a hostile Function is asked to do.
type harm struct {
	path string
	// check judges what it says of its success; nil if no answer is wanted, because the process may not live to give it.
	check func(said int) error
	// writable is whether its root is.
	writable bool
	// within is how soon the Function must answer as itself again; 0 asks for nothing.
	within time.Duration
}

func harms() map[string]harm {
	bounded := func(what string, least, most int) func(int) error {
		return func(said int) error {
			if said < least || said > most {
				return fmt.Errorf("%s: %d, want %d to %d", what, said, least, most)
			}
			return nil
		}
	}
	return map[string]harm{
		// Its children count as its memory, before they are too many for any limit of processes.
		"fork bomb":       {path: "/fork?n=600", within: longStart},
		"memory hog":      {path: "/hog?mib=2048", within: longStart},
		"fills its tmpfs": {path: "/fill?dir=/dev/shm&mib=1024", check: bounded("MiB written", 0, 64)},
		"fills its /tmp":  {path: "/fill?dir=/tmp&mib=1024", check: bounded("MiB written", 1, hostileMemoryBytes>>21)},
		"fills its root":  {path: "/fill?dir=/&mib=256", check: bounded("MiB written", 0, 0)},
		"fills what it may write to of its root": {
			path: "/fill?dir=/&mib=1024", writable: true, check: bounded("MiB written", 1, hostileMemoryBytes>>21), within: longStart,
		},
		"makes empty files":   {path: "/files?dir=/tmp&n=4000000", within: longStart},
		"ignores SIGTERM":     {path: "/deaf"},
		"closes its listener": {path: "/close", within: longStart},
		"floods its log":      {path: "/flood?mib=1024"},
	}
}

// TestHostile has a Function do what harm it can. It hurts only itself: its neighbours answer all the while, no daemon dies, the
// disk is not eaten up, and the Instance ends when it is to.
func TestHostile(t *testing.T) {
	d := start(t)
	neighbours := d.tenants(t)
	villain := tenant{name: "villain", secret: "v-6660"}
	deploy := func(t *testing.T, writable bool) {
		d.deployTenant(t, villain, func(s *hearthv1.FunctionSpec) {
			s.Resources = &hearthv1.Resources{MemoryBytes: hostileMemoryBytes}
			s.Scaling.Max = 1
			s.WritableRoot = writable
		})
	}
	load := d.load(neighbours, longStart)
	defer load.stop()
	if silent, _ := load.answeredSince(t.Context(), load.now(), longStart); len(silent) > 0 {
		t.Fatalf("%v do not answer before any harm is done: %v", silent, load.lastError())
	}
	for name, h := range harms() {
		t.Run(name, func(t *testing.T) {
			deploy(t, h.writable)
			d.suffers(t, villain, h, load)
		})
	}
	load.stop()
	for _, err := range load.strangers {
		t.Error(err)
	}
	if load.failed > 0 {
		t.Errorf("%d of %d requests to neighbours failed, the last: %v", load.failed, load.failed+load.right, load.last)
	}
	t.Logf("neighbours gave %d right answers", load.right)
	for _, f := range neighbours {
		d.toZero(t, f.name)
	}
	d.settles(t)
}

// suffers has the villain do harm, and looks at what came of it.
func (d *deployment) suffers(t *testing.T, villain tenant, h harm, load *load) {
	t.Helper()
	t.Cleanup(func() { d.toZero(t, villain.name) }) // whatever fails below, the next harm begins anew
	d.answersAsItself(t, villain, longStart)
	daemons := d.daemonPIDs(t)
	before := diskBytes(d.config.Root)
	stop, peak := d.watchDisk()
	a, err := d.web.get(t.Context(), villain.name, h.path)
	said, _ := strconv.Atoi(a.body)
	t.Logf("it says %d %.200q, error %v", a.code, a.body, err)
	if h.check != nil {
		if err == nil && a.code != http.StatusOK {
			err = fmt.Errorf("%w: %d", errAnswer, a.code)
		}
		if err == nil {
			err = h.check(said)
		}
		if err != nil {
			t.Error(err)
		}
	}
	if h.within > 0 {
		d.answersAsItself(t, villain, h.within)
	}
	d.toZero(t, villain.name) // waits until nothing of the Instance is left
	stop()
	t.Logf("the disk held up to %d MiB more", (peak.Load()-before)>>20)
	if peak.Load() > before+maxHarmBytes {
		t.Errorf("the disk held up to %d MiB more, want %d at most", (peak.Load()-before)>>20, maxHarmBytes>>20)
	}
	if now := d.daemonPIDs(t); now != daemons {
		t.Errorf("daemons were %s and are %s", daemons, now)
	}
	if silent, _ := load.answeredSince(t.Context(), load.now(), longStart); len(silent) > 0 {
		t.Errorf("%v do not answer any more: %v", silent, load.lastError())
	}
}

// answersAsItself asks until the Function says who it is.
func (d *deployment) answersAsItself(t *testing.T, f tenant, within time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	began := time.Now()
	for {
		err := f.identify(ctx, d.web.client, d.web.url(f.name))
		if err == nil {
			t.Logf("%s answers as itself after %v", f.name, time.Since(began).Round(time.Millisecond))
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%s does not answer as itself within %v: %v", f.name, within, err)
		}
		nap(ctx, 50*time.Millisecond)
	}
}

// daemonPIDs are the daemons' processes, in words: the same as long as none has died.
func (d *deployment) daemonPIDs(t *testing.T) (out string) {
	t.Helper()
	for _, name := range []string{"containerd", "nodeagent", "poolmanager", "gateway", "registry"} {
		out += fmt.Sprintf("%s %d ", name, d.pid(t, name))
	}
	return out
}

// watchDisk follows what the deployment's data takes, until it is stopped.
func (d *deployment) watchDisk() (stop func(), peak *atomic.Int64) {
	ctx, cancel := context.WithCancel(context.Background())
	peak = &atomic.Int64{}
	var work sync.WaitGroup
	work.Go(func() {
		for ctx.Err() == nil {
			peak.Store(max(peak.Load(), diskBytes(d.config.Root)))
			nap(ctx, 100*time.Millisecond)
		}
	})
	return func() {
		cancel()
		work.Wait()
	}, peak
}

// diskBytes is what the files of a folder take, whatever comes and goes meanwhile.
func diskBytes(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		if info, err := e.Info(); err == nil {
			n += allocated(info)
		}
		return nil
	})
	return n
}

// allocated is what a file has of the disk, which is less than its size where it has holes.
func allocated(info os.FileInfo) int64 { return info.Sys().(*syscall.Stat_t).Blocks * 512 }
