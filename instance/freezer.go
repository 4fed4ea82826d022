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
	"time"
)

// How often the kernel is asked whether everything has stopped. Most processes stop within the first.
const (
	freezeFirst = 100 * time.Microsecond
	freezeMost  = 20 * time.Millisecond
)

// Words of the freezer of version 1. A cgroup stays FREEZING for as long as one of its processes cannot be stopped.
const (
	v1Frozen = "FROZEN"
	v1Thawed = "THAWED"
)

// file is the path of a Function's file: file1 of a hierarchy of version 1, or file2.
func (c cgroups) file(m member, hierarchy, file1, file2 string) string {
	if c.unified() {
		return filepath.Join(c.root, c.function(m), file2)
	}
	return filepath.Join(c.root, hierarchy, c.function(m), file1)
}

// writeCgroup writes to a file of a cgroup. os.WriteFile would try to make one that is not there, and be answered with an error
// that misleads.
func writeCgroup(path, word string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(word)
	return errors.Join(err, f.Close())
}

// freeze stops all processes of a Function and returns when they have stopped. It changes the freezer itself and not through
// containerd and runc, which take ten times as long for a thaw, and one does not undo what the other did. After an error some
// may have stopped.
func (c cgroups) freeze(ctx context.Context, m member) error {
	word := v1Frozen
	if c.unified() {
		word = "1"
	}
	if err := writeCgroup(c.file(m, "freezer", "freezer.state", "cgroup.freeze"), word); err != nil {
		return fmt.Errorf("freeze %s: %w", m.id, err)
	}
	for delay := freezeFirst; ; delay = min(2*delay, freezeMost) {
		stopped, err := c.stopped(m)
		if err != nil {
			return fmt.Errorf("freeze %s: %w", m.id, err)
		}
		if stopped {
			return nil
		}
		if !sleep(ctx, delay) {
			return fmt.Errorf("freeze %s: a process of it cannot be stopped: %w", m.id, ctx.Err())
		}
	}
}

// stopped tells whether all processes have come to a stop.
func (c cgroups) stopped(m member) (bool, error) {
	text, err := os.ReadFile(c.file(m, "freezer", "freezer.state", "cgroup.events"))
	if err != nil {
		return false, err
	}
	if c.unified() {
		return number(text, "frozen") == 1, nil
	}
	return strings.TrimSpace(string(text)) == v1Frozen, nil
}

// thaw lets all processes of a Function go on. One that has no cgroup has none to thaw.
func (c cgroups) thaw(m member) error {
	word := v1Thawed
	if c.unified() {
		word = "0"
	}
	err := writeCgroup(c.file(m, "freezer", "freezer.state", "cgroup.freeze"), word)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("thaw %s: %w", m.id, err)
	}
	return nil
}

// thawed tells whether nothing holds the processes of a Function: what the freezer was told, whether or not it is done with it.
func (c cgroups) thawed(m member) (bool, error) {
	text, err := os.ReadFile(c.file(m, "freezer", "freezer.state", "cgroup.freeze"))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("ask whether %s is frozen: %w", m.id, err)
	}
	word := strings.TrimSpace(string(text))
	return word == v1Thawed || word == "0", nil
}

// memory is what a Function uses, without the files that it has read and that the kernel can drop at once.
func (c cgroups) memory(m member) (int64, error) {
	text, err := os.ReadFile(c.file(m, "memory", "memory.usage_in_bytes", "memory.current"))
	if err != nil {
		return 0, fmt.Errorf("memory of %s: %w", m.id, err)
	}
	used, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("memory of %s: %w", m.id, err)
	}
	stat, err := os.ReadFile(c.file(m, "memory", "memory.stat", "memory.stat"))
	if err != nil {
		return 0, fmt.Errorf("memory of %s: %w", m.id, err)
	}
	key := "total_inactive_file"
	if c.unified() {
		key = "inactive_file"
	}
	return max(used-number(stat, key), 0), nil
}

// reclaim has the kernel move a Function's memory to swap, where it can: it needs cgroups of version 2 and swap. Less than asked
// for is no error.
func (c cgroups) reclaim(m member, amount int64) {
	if c.unified() && amount > 0 {
		_ = writeCgroup(filepath.Join(c.root, c.function(m), "memory.reclaim"), strconv.FormatInt(amount, 10))
	}
}

// number finds the value of a key in a file of lines "KEY VALUE"; 0 if there is none.
func number(text []byte, key string) int64 {
	for line := range bytes.Lines(text) {
		k, v, ok := strings.Cut(strings.TrimSpace(string(line)), " ")
		if ok && k == key {
			n, _ := strconv.ParseInt(v, 10, 64) // the kernel's own number
			return n
		}
	}
	return 0
}
