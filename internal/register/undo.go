package register

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hearth-serverless/hearth/internal/doctor"
)

// Undo takes back what Do has done: the files are, byte for byte, what they were. What somebody else has changed in between is kept,
// without our part.
func Undo(ctx context.Context, c Config) error {
	r, err := c.look(ctx)
	if err != nil {
		return err
	}
	old, err := readRecord(r.State)
	if err != nil {
		return err
	}
	if old == nil {
		r.say("nothing was registered by this program")
		if c.Purge {
			return r.purge()
		}
		return nil
	}
	if err := r.needed(old); err != nil {
		return refused(err)
	}
	if c.Purge && r.running.Exports != nil {
		if err := forget(ctx, r.Containerd, r.Name); err != nil {
			return err
		}
	}
	if old.Main != nil {
		if err := r.restoreMain(old.Main); err != nil {
			return err
		}
	}
	if err := r.removeDropIn(old); err != nil {
		return err
	}
	for _, dir := range backward(old.Folders) {
		_ = os.Remove(dir) // if it is empty
	}
	for _, t := range old.Times {
		if err := os.Chtimes(t.Path, t.Accessed, t.Modified); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := r.unload(ctx); err != nil {
		return err // what is recorded stays, for another try
	}
	if c.Purge {
		if err := r.purge(); err != nil {
			return err
		}
	}
	return os.RemoveAll(r.State)
}

// needed refuses if containerd would not be whole without us.
func (r *registrar) needed(old *record) error {
	config, err := doctor.LoadWithout(r.Main, old.DropIn.Path)
	if err != nil {
		return err
	}
	if _, there := config.Knows(r.Name); there {
		return nil
	}
	if used, path := config.CRISnapshotter(); used == r.Name {
		return &doctor.Refusal{Found: "the CRI's snapshotter is " + used, Meaning: "without the registration containerd's CRI would not start",
			Fix: &doctor.Fix{File: path, Line: "snapshotter = 'overlayfs'"}}
	}
	return nil
}

// restoreMain gives the main file back, or takes our line out of it if it was changed since.
func (r *registrar) restoreMain(e *edit) error {
	now, err := readBounded(e.Path)
	if errors.Is(err, fs.ErrNotExist) {
		r.say("%s is gone", e.Path)
		return nil
	}
	if err != nil {
		return err
	}
	switch sum(now) {
	case e.Before.SHA256: // an earlier try, or never written
		return nil
	case e.SHA256:
		original, err := readBounded(filepath.Join(r.State, originalName))
		if err == nil && sum(original) != e.Before.SHA256 {
			err = fmt.Errorf("%s is not what was put there", filepath.Join(r.State, originalName))
		}
		if err != nil {
			return fmt.Errorf("restore %s: %w", e.Path, err)
		}
		if err := e.Before.replace(e.Path, original); err != nil {
			return err
		}
		r.say("restored %s", e.Path)
		return nil
	}
	if bytes.Count(now, []byte(e.Added)) != 1 {
		r.say("%s was changed since, and does not have our import as we wrote it: it is left as it is", e.Path)
		return nil
	}
	before, err := statOf(e.Path, now)
	if err != nil {
		return err
	}
	if err := before.replace(e.Path, bytes.Replace(now, []byte(e.Added), nil, 1)); err != nil {
		return err
	}
	r.say("took our import out of %s, which was changed since: the changes stay", e.Path)
	return nil
}

// removeDropIn removes the drop-in. One that was changed is put where containerd does not read it.
func (r *registrar) removeDropIn(old *record) error {
	now, err := readBounded(old.DropIn.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if sum(now) != old.DropIn.SHA256 {
		kept := old.DropIn.Path + ".changed"
		r.say("%s was changed since: it is %s now, which containerd does not read", old.DropIn.Path, kept)
		return os.Rename(old.DropIn.Path, kept)
	}
	if err := os.Remove(old.DropIn.Path); err != nil {
		return err
	}
	r.say("removed %s", old.DropIn.Path)
	return syncFolder(filepath.Dir(old.DropIn.Path))
}

func backward(paths []string) []string {
	out := make([]string, 0, len(paths))
	for i := len(paths) - 1; i >= 0; i-- {
		out = append(out, paths[i])
	}
	return out
}
