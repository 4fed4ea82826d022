package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	// settleTime is what a node has to be rid of an image that was removed. nodeagent holds the layers of a pull that was given up
	// for a minute, for the one who tries again.
	settleTime = 75 * time.Second
	// spareFiles may be open more than before: connections that are kept for a while.
	spareFiles = 32
)

// victim is a node that faults happen to, and what must be as it was when they are over.
type victim struct {
	*faulter
	system   string
	deadline time.Duration // of a pull in the case at hand
	typical  time.Duration // that a pull takes when nothing is wrong
	used     int64         // bytes on the disk that it takes
	fs       *scratch
	node     *node // nil if there is none
	before   possessions
	pulled   []string // images that are to be removed
}

// possessions of a node.
type possessions struct {
	files map[string]bool // in the snapshotter's folders
	open  map[string]bool // files that are open in there
	fds   int
	mount map[string]bool
}

// begin starts a node, unless there is one.
func (v *victim) begin(ctx context.Context) (err error) {
	if v.node != nil {
		return nil
	}
	if v.fs, err = newScratch(ctx, v.memory); err != nil {
		return err
	}
	if v.node, err = startNode(ctx, v.o, v.fs.Dir, v.system, v.origin.address); err != nil {
		return errors.Join(err, v.fs.remove())
	}
	v.pulled = nil
	v.before, err = v.possessions()
	return err
}

// end takes the node away.
func (v *victim) end() error {
	if v.node == nil {
		return nil
	}
	err := errors.Join(v.node.close(), v.fs.remove())
	v.node = nil
	return err
}

// pull pulls an image within the case's deadline.
func (v *victim) pull(ctx context.Context, ref string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, v.deadline)
	defer cancel()
	v.pulled = append(v.pulled, ref)
	took, err := v.node.pull(ctx, ref)
	if ctx.Err() != nil {
		return took, fmt.Errorf("the pull has not ended within %v: %w", v.deadline, err)
	}
	return took, err
}

// same compares the tree of what was pulled with that of an honest pull.
func (v *victim) same(ctx context.Context, ref, image string) error {
	tree, err := v.node.tree(ctx, ref)
	if err != nil {
		return err
	}
	if diff := Differences(v.trees[image], tree, 3); len(diff) > 0 {
		return fmt.Errorf("the tree is not that of an honest pull (first): %q", diff)
	}
	return nil
}

// clean removes what was pulled, and waits until the node has what it had before.
func (v *victim) clean(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	for _, ref := range v.pulled {
		if err := v.node.remove(ctx, ref); err != nil {
			return err
		}
	}
	v.pulled = nil
	if err := v.node.endLeases(ctx); err != nil {
		return err
	}
	for {
		now, err := v.possessions()
		if err != nil {
			return err
		}
		left := now.beyond(v.before)
		if len(left) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("still there %v after the image was removed: %s", settleTime, strings.Join(left[:min(len(left), 5)], ", "))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// possessions that the node has now. Only of hearth are files looked at: what peers keep is their affair.
func (v *victim) possessions() (p possessions, err error) {
	if p.mount, err = mountsBelow(v.fs.Dir); err != nil || v.system != "hearth" {
		return p, err
	}
	root := filepath.Join(v.fs.Dir, "hearth", "snapshotter")
	p.files = map[string]bool{}
	for _, dir := range []string{"staging", "layers", "snapshots", "trash"} {
		found, err := filepath.Glob(filepath.Join(root, dir, "*"))
		if err != nil {
			return p, err
		}
		for _, name := range found {
			p.files[name] = true
		}
	}
	pids, err := v.node.processes()
	if err != nil {
		return p, err
	}
	p.open, p.fds, err = openBelow(pids[0], root)
	return p, err
}

// openBelow returns the files below dir that a process has open, and how many it has open in all.
func openBelow(pid int, dir string) (open map[string]bool, all int, err error) {
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(fds)
	if err != nil {
		return nil, 0, fmt.Errorf("read open files: %w", err)
	}
	open = map[string]bool{}
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(fds, e.Name()))
		if err == nil && strings.HasPrefix(to, dir+"/") {
			open[to] = true
		}
	}
	return open, len(entries), nil
}

// beyond is what there is that was not before.
func (p possessions) beyond(before possessions) (left []string) {
	for _, kind := range []struct {
		name      string
		now, then map[string]bool
	}{{"file", p.files, before.files}, {"open file", p.open, before.open}, {"mount", p.mount, before.mount}} {
		for _, name := range slices.Sorted(maps.Keys(kind.now)) {
			if !kind.then[name] {
				left = append(left, kind.name+" "+name)
			}
		}
	}
	if p.fds > before.fds+spareFiles {
		left = append(left, fmt.Sprintf("%d open files, before %d", p.fds, before.fds))
	}
	return left
}
