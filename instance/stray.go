package instance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// strayAge is for how long a network namespace has to have been nobody's: longer than the making of a sandbox may take.
const strayAge = 2 * time.Minute

// networks is the part of a backend that knows of them.
type networks interface {
	// Mentioned tells which names containerd's records of sandboxes and containers have anywhere, whoever's they are.
	Mentioned(ctx context.Context, names []string) (map[string]bool, error)
}

// strays looks for network namespaces that a kill of containerd has left: made, mounted in the CRI's folder and not recorded, so that
// nobody ever removes them. It is used by one goroutine.
type strays struct {
	dir   string // the CRI's folder; empty: there may be others' in it
	proc  string
	age   time.Duration
	since map[string]time.Time // by name: when it was first seen to be nobody's
}

// names lists what may be network namespaces of the CRI's.
func (s *strays) names() ([]string, error) {
	if s.dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var names []string
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), "cni-") && entry.Type().IsRegular() {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

// remove removes those that have been nobody's for long enough, and returns their names. Known are the namespaces of sandboxes that
// are Instances'; of others containerd is asked, and then all processes are.
func (s *strays) remove(ctx context.Context, known map[uint64]bool, b networks) ([]string, error) {
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		ino, err := inode(filepath.Join(s.dir, name))
		return err != nil || known[ino]
	})
	mentioned := map[string]bool{}
	if len(names) > 0 {
		if mentioned, err = b.Mentioned(ctx, names); err != nil {
			return nil, err
		}
	}
	now, since := time.Now(), map[string]time.Time{}
	var old []string
	for _, name := range names {
		if mentioned[name] {
			continue
		}
		if since[name] = now; !s.since[name].IsZero() {
			since[name] = s.since[name]
		}
		if now.Sub(since[name]) >= s.age {
			old = append(old, name)
		}
	}
	s.since = since
	if len(old) == 0 {
		return nil, nil
	}
	lived, err := lived(s.proc)
	if err != nil {
		return nil, err
	}
	var removed []string
	for _, name := range old {
		path := filepath.Join(s.dir, name)
		ino, err := inode(path)
		if err != nil || lived[ino] {
			continue
		}
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) { // the latter when nothing is mounted
			return removed, fmt.Errorf("unmount network namespace %s: %w", path, err)
		}
		if err := os.Remove(path); err != nil {
			return removed, fmt.Errorf("remove network namespace: %w", err)
		}
		removed = append(removed, name)
	}
	return removed, nil
}

// lived are the network namespaces in which any thread of the machine is.
func lived(proc string) (map[uint64]bool, error) {
	found, err := filepath.Glob(filepath.Join(proc, "[0-9]*", "task", "[0-9]*", "ns", "net"))
	if err != nil {
		return nil, err
	}
	lived := map[uint64]bool{}
	for _, path := range found {
		if ino, err := inode(path); err == nil { // or it has ended
			lived[ino] = true
		}
	}
	if len(lived) == 0 { // not even our own
		return nil, fmt.Errorf("network namespaces of processes cannot be read in %s", proc)
	}
	return lived, nil
}

// removeStrays removes network namespaces that nobody will ever remove.
func (e *Engine) removeStrays(ctx context.Context) {
	known := map[uint64]bool{}
	for _, i := range e.all() {
		i.mu.Lock()
		known[i.sandbox.Netns] = true
		i.mu.Unlock()
	}
	removed, err := e.strays.remove(ctx, known, e.backend)
	for _, name := range removed {
		e.log.Warn("network namespace of no sandbox removed", "name", name)
	}
	if err != nil {
		e.log.Warn("network namespaces of no sandbox not removed", "error", err)
	}
}

// Mentioned implements networks. The names are such that nothing else has them, so how containerd writes its records does not matter.
func (n *node) Mentioned(ctx context.Context, names []string) (map[string]bool, error) {
	ctx = n.in(ctx)
	containers, err := n.client.ContainerService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	boxes, err := n.client.SandboxStore().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list records of sandboxes: %w", err)
	}
	mentioned := map[string]bool{}
	look := func(text []byte) {
		for _, name := range names {
			if bytes.Contains(text, []byte(name)) {
				mentioned[name] = true
			}
		}
	}
	for _, c := range containers {
		look(c.Spec.GetValue())
	}
	for _, s := range boxes {
		if s.Spec != nil {
			look(s.Spec.GetValue())
		}
		for _, extension := range s.Extensions {
			look(extension.GetValue())
		}
	}
	return mentioned, nil
}
