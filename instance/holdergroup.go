package instance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// holderLeaf is where a holder's own process goes with version 2.
const holderLeaf = "holder"

// podGroups remembers the cgroups of holders, the containers of pods that the kubelet has made: ours are below them. A nil one knows none.
type podGroups struct {
	mu    sync.Mutex // guards paths
	paths map[string]string
}

func (g *podGroups) of(pod string) string {
	if g == nil {
		return ""
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.paths[pod]
}

// learn remembers the cgroup of a pod's holder. What is none is not remembered.
func (g *podGroups) learn(pod, path string) {
	if g == nil || !isPodGroup(path) {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.paths[pod] = path
}

func (g *podGroups) forget(pod string) {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.paths, pod)
}

// makeRoom makes it possible that there are cgroups below a holder's: with version 2, one that has some with limits has no process itself.
// Whoever looks at the holder's sees the sum all the same, and runc has later processes join the first where that is.
func (c cgroups) makeRoom(pod string) error {
	in := c.learnt.of(pod)
	if in == "" || !c.unified() {
		return nil
	}
	from, to := filepath.Join(c.root, in), filepath.Join(c.root, in, holderLeaf)
	if err := os.Mkdir(to, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make room for cgroups: %w", err)
	}
	for range maxMoves {
		inside, err := processesIn(from)
		if err != nil || len(inside) == 0 {
			return err
		}
		for _, pid := range inside {
			err := writeCgroup(filepath.Join(to, "cgroup.procs"), strconv.Itoa(pid))
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("make room for cgroups below %s: %w", in, err)
			}
		}
	}
	return fmt.Errorf("make room for cgroups below %s: processes come faster than they are moved", in)
}

// maxMoves is how often a holder's cgroup is looked at until it is empty: a process may have made another meanwhile.
const maxMoves = 10

// removeOwn removes the cgroups that we have made for containers of ours, and nothing else: that is the kubelet's.
func (c cgroups) removeOwn(ctx context.Context, pod string) error {
	dirs, err := c.directories(c.pod(pod))
	if err != nil {
		return err
	}
	own := map[string]bool{}
	for _, dir := range dirs {
		for _, name := range []string{"fn", "fn-*", "sidecar"} {
			found, _ := filepath.Glob(filepath.Join(dir, name)) // the pattern is ours
			for _, path := range found {
				own[filepath.Join(c.pod(pod), filepath.Base(path))] = true
			}
		}
	}
	for path := range own {
		if err := c.remove(ctx, path); err != nil {
			return err
		}
	}
	return nil
}

// maxProcCgroup bounds what is read of a /proc/PID/cgroup.
const maxProcCgroup = 64 << 10

// holderGroup finds the cgroup of a holder by its process.
func holderGroup(proc string, pid uint32) (string, error) {
	file := filepath.Join(proc, strconv.FormatUint(uint64(pid), 10), "cgroup")
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("cgroup of the pod's container: %w", err)
	}
	path, err := parseHolderGroup(text[:min(len(text), maxProcCgroup)])
	if err != nil {
		return "", fmt.Errorf("cgroup of the pod's container, by %s: %w", file, err)
	}
	return path, nil
}

// parseHolderGroup reads a /proc/PID/cgroup, lines of "NUMBER:CONTROLLERS:PATH". With version 2 there is one path. With version 1 each
// hierarchy has one; we make ours in all of them by the same name, so those that we write to have to agree.
func parseHolderGroup(text []byte) (string, error) {
	var unified, found string
	for line := range bytes.Lines(text) {
		fields := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(fields) != 3 {
			return "", fmt.Errorf("%.80q is no line of that file", line)
		}
		if fields[1] == "" {
			unified = fields[2]
			continue
		}
		for controller := range strings.SplitSeq(fields[1], ",") {
			switch controller {
			case "memory", "cpu", "freezer":
			default:
				continue
			}
			if found != "" && found != fields[2] {
				return "", fmt.Errorf("it is %.200q in one hierarchy and %.200q in another", found, fields[2])
			}
			found = fields[2]
		}
	}
	if found == "" {
		found = unified
	}
	if filepath.Base(found) == holderLeaf {
		found = filepath.Dir(found)
	}
	if !isPodGroup(found) || filepath.Dir(found) == "/" {
		return "", errors.New("it is in no cgroup of its own below a pod's: " + strconv.Quote(found[:min(len(found), 200)]))
	}
	return found, nil
}

// isPodGroup tells whether a path can be a cgroup of a pod's: that of the machine, or one above what we see of it, is none.
func isPodGroup(path string) bool {
	return filepath.IsAbs(path) && filepath.Clean(path) == path && path != "/" && !strings.HasPrefix(path, "/..")
}
