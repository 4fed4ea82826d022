package node_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/prefetch"
)

// newPrefetchNode is an instanceNode that records starts and reads ahead of them.
func newPrefetchNode(t *testing.T) (*instanceNode, *prefetch.Prefetcher) {
	t.Helper()
	n := newInstanceNode(t)
	cfg := prefetch.Config{Root: filepath.Join(n.Dir, "profiles"), Logger: n.log}
	cfg.Trace(n.log)
	if cfg.Tracer == nil {
		t.Skip("this kernel does not tell what starts read")
	}
	ahead, err := prefetch.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.stop()
	n.prefetch = ahead
	n.startEngine()
	return n, ahead
}

// forget has the layers' files leave memory: those that are shown, and the images that they are in.
func (n *instanceNode) forget() {
	n.t.Helper()
	for range 2 { // what is read from an image lets go of its pages first
		err := filepath.WalkDir(n.layers, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return err
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			return errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
		})
		if err != nil {
			n.t.Fatal(err)
		}
	}
}

// memoryOf reads what a Function takes of memory, and how much of that are files.
func (n *instanceNode) memoryOf(id string) (all, files int64) {
	n.t.Helper()
	dir, total, stat := filepath.Join("/sys/fs/cgroup/memory", n.cgroup, "pod-"+id, "fn"), "memory.usage_in_bytes", "cache "
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		dir, total, stat = filepath.Join("/sys/fs/cgroup", n.cgroup, "pod-"+id, "fn"), "memory.current", "file "
	}
	usage, err := os.ReadFile(filepath.Join(dir, total))
	if err != nil {
		n.t.Fatal(err)
	}
	stats, err := os.ReadFile(filepath.Join(dir, "memory.stat"))
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(string(stats)) {
		if value, ok := strings.CutPrefix(line, stat); ok {
			files, err = strconv.ParseInt(strings.TrimSpace(value), 10, 64)
		}
	}
	all, other := strconv.ParseInt(strings.TrimSpace(string(usage)), 10, 64)
	if err := errors.Join(err, other); err != nil {
		n.t.Fatal(err)
	}
	return all, files
}

// startOne starts the Function in a new Instance, and returns what memory it takes then.
func (n *instanceNode) startOne(id string) (all, files int64) {
	n.t.Helper()
	n.create(id)
	answer := n.activate(id)
	if got := n.get(answer.Instance.Address, "/"); got != "hello" {
		n.t.Errorf("%s answers %q", id, got)
	}
	return n.memoryOf(id)
}

// TestPrefetch: three starts are recorded, and what they have read is in memory before the fourth asks for it, at nodeagent's cost.
func TestPrefetch(t *testing.T) {
	n, ahead := newPrefetchNode(t)
	recorded := func(starts int) {
		t.Helper()
		n.eventually(func() error {
			for _, u := range ahead.Usage() {
				if u.Starts == starts {
					return nil
				}
			}
			return fmt.Errorf("%d starts are not recorded: %+v", starts, ahead.Usage())
		})
	}
	for i := range 3 {
		id := fmt.Sprint("start-", i)
		n.startOne(id)
		recorded(i + 1)
		n.discard(id)
	}
	before := ahead.Usage()[0]
	encoded, ok := ahead.Profile(before.Image)
	if !ok {
		t.Fatal("there is no profile")
	}
	p, err := prefetch.Parse(encoded)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Files) != 1 || p.Files[0].Path != "function" || p.Lost > 0 {
		t.Errorf("the profile is %+v", p)
	}

	allWarm, warm := n.startOne("warm")
	recorded(4)
	n.discard("warm")
	n.forget()
	allCold, cold := n.startOne("cold")
	after := ahead.Usage()[0]
	read := after.Ahead - before.Ahead
	t.Logf("profile: %d bytes in %d; read ahead %d, used %d, in vain %d", p.Bytes(), len(encoded), read, after.Used, after.InVain)
	if read < p.Bytes()/2 {
		t.Errorf("of %d bytes, %d were read ahead of a start from the disk", p.Bytes(), read)
	}
	if cold > warm+p.Bytes()/10 {
		t.Errorf("the Function is charged with %d bytes of files, and with %d if they are in memory", cold, warm)
	}
	const batches = 1 << 20 // what the kernel charges ahead, for each processor
	if diff := max(allCold-allWarm, allWarm-allCold); diff > allWarm/50+batches {
		t.Errorf("the Function is charged with %d bytes, and with %d if its files are in memory", allCold, allWarm)
	}
	n.discard("cold")
}
