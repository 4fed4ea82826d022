package instance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// What systemd calls cgroups. A runc that makes them through systemd gives a container a scope in a slice, by a name that nothing
// else on the machine has.
const (
	sliceSuffix = ".slice"
	scopeSuffix = ".scope"
	scopePrefix = "hearth"
)

// podGroups remembers the cgroups of pods that the kubelet has made. A nil one knows none.
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

// learn remembers a pod's cgroup. What is none is not remembered.
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

// below is the cgroup of a container of a pod.
func (c cgroups) below(pod, name string) string {
	in := c.pod(pod)
	if strings.HasSuffix(in, sliceSuffix) {
		name = scopePrefix + "-" + pod + "." + name + scopeSuffix
	}
	return filepath.Join(in, name)
}

// runcPath is how runc is told of a container's cgroup: by its path, or, if it is a scope of systemd's, as SLICE:PREFIX:NAME.
func runcPath(path string) string {
	name, scope := strings.CutSuffix(filepath.Base(path), scopeSuffix)
	if !scope {
		return path
	}
	return filepath.Base(filepath.Dir(path)) + ":" + scopePrefix + ":" + strings.TrimPrefix(name, scopePrefix+"-")
}

// removeOwn removes the cgroups that we have made in a pod's, and nothing else there: that is the kubelet's.
func (c cgroups) removeOwn(ctx context.Context, pod string) error {
	dirs, err := c.directories(c.pod(pod))
	if err != nil {
		return err
	}
	own := map[string]bool{}
	for _, dir := range dirs {
		for _, name := range []string{c.below(pod, "fn"), c.below(pod, "fn-*"), c.below(pod, "sidecar")} {
			found, _ := filepath.Glob(filepath.Join(dir, filepath.Base(name))) // the pattern is ours
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

// podGroupOf finds the cgroup of a pod by a process of its sandbox, which is in one below it.
func podGroupOf(proc string, pid uint32) (string, error) {
	file := filepath.Join(proc, strconv.FormatUint(uint64(pid), 10), "cgroup")
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("cgroup of the pod: %w", err)
	}
	path, err := parsePodGroup(text[:min(len(text), maxProcCgroup)])
	if err != nil {
		return "", fmt.Errorf("cgroup of the pod, by %s: %w", file, err)
	}
	return path, nil
}

// parsePodGroup reads a /proc/PID/cgroup, lines of "NUMBER:CONTROLLERS:PATH". With version 2 there is one path. With version 1 each
// hierarchy has one; we make ours in all of them by the same name, so those that we write to have to agree.
func parsePodGroup(text []byte) (string, error) {
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
	pod := filepath.Dir(found)
	if !isPodGroup(pod) || filepath.Clean(found) != found {
		return "", errors.New("the sandbox is in no cgroup of its own below a pod's: " + strconv.Quote(found[:min(len(found), 200)]))
	}
	return pod, nil
}

// isPodGroup tells whether a path can be a pod's cgroup: that of the machine, or one above what we see of it, is none.
func isPodGroup(path string) bool {
	return filepath.IsAbs(path) && filepath.Clean(path) == path && path != "/" && !strings.HasPrefix(path, "/..")
}
