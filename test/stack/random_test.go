package stack_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// killsForRecovery is from when on a drill is judged by how soon everything answers again. Few kills on a machine that does other
// things beside them say nothing about that.
const killsForRecovery = 20

// TestKilledAtRandom kills daemons, shims and what runs inside Instances at random moments, while Functions of several tenants are
// asked, started anew, frozen and thawed all the time. No Function ever answers for another, nor with another's code, environment or
// secret; all of them answer again soon, and nothing is left over.
func TestKilledAtRandom(t *testing.T) {
	for name, sidecars := range map[string]bool{"without sidecars": false, "with sidecars": true} {
		t.Run(name, func(t *testing.T) { killedAtRandom(t, sidecars) })
	}
}

func killedAtRandom(t *testing.T, sidecars bool) {
	d := start(t, func(c *stack.Config) { c.Sidecar = sidecars })
	functions := d.tenants(t)
	var keeping []string
	for _, f := range functions {
		if f.keeps {
			keeping = append(keeping, f.name)
		}
	}
	h := newHistory(keeping...)
	stopWatching := h.watch(d)
	defer stopWatching()
	load := d.load(functions, recovery)
	defer load.stop()
	within := longStart
	if *kills >= killsForRecovery {
		within = recovery
	}
	if who, _ := load.answeredSince(t.Context(), load.now(), longStart); len(who) > 0 {
		t.Fatalf("no answer of %v before anything was killed: %v", who, load.lastError())
	}
	var longest time.Duration
	for n := range *kills {
		nap(t.Context(), time.Duration(rand.IntN(500))*time.Millisecond)
		who := d.killSomething(t, n)
		at := load.now()
		silent, took := load.answeredSince(t.Context(), at, within)
		longest = max(longest, took)
		t.Logf("killed %s: all answer again after %v (%s)", who, took.Round(time.Millisecond), load.slowest())
		if len(silent) > 0 {
			t.Fatalf("%v do not answer within %v after %s was killed: %v", silent, within, who, load.lastError())
		}
	}
	load.stop()
	t.Logf("%d kills; the longest until all answered again was %v; %d right answers, %d refusals and breaks", *kills, longest.Round(time.Millisecond), load.right, load.failed)
	for _, f := range functions {
		d.toZero(t, f.name)
	}
	d.settles(t)
	stopWatching()
	h.check(t, len(functions))
	for _, err := range load.strangers {
		t.Error(err)
	}
}

// killSomething kills a process of a kind that there is, with each kind in its turn, and says which it was.
func (d *deployment) killSomething(t *testing.T, turn int) string {
	t.Helper()
	kinds := d.victims()
	for _, daemon := range []string{"nodeagent", "containerd", "poolmanager", "gateway"} {
		if pid := d.pid(t, daemon); pid != 0 {
			kinds[daemon] = []int{pid}
		}
	}
	names := slices.Sorted(maps.Keys(kinds))
	// Each kind comes about as often as any other, whatever order chance has them in.
	name := names[(turn+rand.IntN(2))%len(names)]
	pid := kinds[name][rand.IntN(len(kinds[name]))]
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		t.Fatalf("kill %s: %v", name, err)
	}
	return name
}

// victims are the shims, and the processes inside Instances: pause, launchers, Functions, and whatever else there comes to be.
func (d *deployment) victims() map[string][]int {
	kinds := map[string][]int{}
	for _, process := range marked(d.config.Run) {
		number, name, _ := strings.Cut(process, " ")
		if pid, err := strconv.Atoi(number); err == nil && strings.HasPrefix(name, "containerd-shim") {
			kinds["a shim"] = append(kinds["a shim"], pid)
		}
	}
	hierarchies, _ := filepath.Glob("/sys/fs/cgroup/*/hearth-" + d.config.Name)
	for _, top := range append(hierarchies, "/sys/fs/cgroup/hearth-"+d.config.Name) {
		_ = filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.Name() != "cgroup.procs" {
				return nil // others come and go
			}
			list, _ := os.ReadFile(path)
			for field := range strings.FieldsSeq(string(list)) {
				pid, err := strconv.Atoi(field)
				name, nameErr := os.ReadFile("/proc/" + field + "/comm")
				kind := "inside an instance: " + strings.TrimSpace(string(name))
				if err == nil && nameErr == nil && !slices.Contains(kinds[kind], pid) {
					kinds[kind] = append(kinds[kind], pid)
				}
			}
			return nil
		})
	}
	return kinds
}

// freezing is how long nobody asks a Function that keeps its Instances: long enough for them to be frozen.
const freezing = 2 * time.Second

// load asks Functions all the time who they are, and has them started anew.
type load struct {
	stop  func()
	began time.Time

	mu            sync.Mutex // guards what follows
	changed       chan struct{}
	good          map[string]time.Duration // when the last request that was answered rightly began
	lastly        string                   // whose that was
	right, failed int
	strangers     []error
	last          error            // of all
	lasts         map[string]error // of each since its last right answer
}

// load begins to ask; an answer may take as long as patience has it.
func (d *deployment) load(functions []tenant, patience time.Duration) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{began: time.Now(), good: map[string]time.Duration{}, lasts: map[string]error{}, changed: make(chan struct{})}
	var work sync.WaitGroup
	for _, f := range functions {
		l.good[f.name] = -1
		askers, pause := 2, 5*time.Millisecond
		if f.keeps {
			askers, pause = 1, freezing
		}
		for range askers {
			work.Go(func() { l.ask(ctx, d, f, patience, pause) })
		}
	}
	work.Go(func() { l.startAnew(ctx, d, functions) })
	l.stop = sync.OnceFunc(func() {
		cancel()
		work.Wait()
	})
	return l
}

func (l *load) now() time.Duration { return time.Since(l.began) }

func (l *load) ask(ctx context.Context, d *deployment, f tenant, patience, pause time.Duration) {
	for ctx.Err() == nil {
		began := l.now()
		asked, cancel := context.WithTimeout(ctx, patience)
		err := f.identify(asked, d.web.client, d.web.url(f.name))
		cancel()
		if ctx.Err() == nil {
			l.count(f, began, err)
		}
		nap(ctx, pause)
	}
}

func (l *load) count(f tenant, began time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case errors.Is(err, errStranger):
		l.strangers = append(l.strangers, err)
	case err != nil:
		l.failed++
		l.last = fmt.Errorf("%s: %w", f.name, err)
		l.lasts[f.name] = fmt.Errorf("%v %w", began, err)
	default:
		l.right++
		if began > l.good[f.name] {
			l.good[f.name], l.lastly = began, fmt.Sprintf("%s was the last, before that: %v", f.name, l.lasts[f.name])
			delete(l.lasts, f.name)
		}
		close(l.changed)
		l.changed = make(chan struct{})
	}
}

// startAnew takes one Function after the other to zero, but those that keep their Instances, so that there are claims under way when something is killed.
func (l *load) startAnew(ctx context.Context, d *deployment, functions []tenant) {
	busy := slices.DeleteFunc(slices.Clone(functions), func(f tenant) bool { return f.keeps })
	for i := 0; ctx.Err() == nil; i++ {
		nap(ctx, 300*time.Millisecond)
		released, cancel := context.WithTimeout(ctx, recovery)
		// What comes of it is not of interest: poolmanager may be dead.
		_, _ = d.allocation.Release(released, connect.NewRequest(&hearthv1.ReleaseRequest{Function: busy[i%len(busy)].name}))
		cancel()
	}
}

// answeredSince waits until every Function has answered a request that began after a moment, and says which have not in time.
func (l *load) answeredSince(ctx context.Context, at, within time.Duration) (silent []string, took time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		l.mu.Lock()
		changed := l.changed
		silent = nil
		for name, good := range l.good {
			if good <= at {
				silent = append(silent, name)
			}
		}
		l.mu.Unlock()
		if len(silent) == 0 || ctx.Err() != nil {
			return silent, l.now() - at
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// slowest says who has answered last, and what it had failed with before.
func (l *load) slowest() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastly
}

func (l *load) lastError() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}
