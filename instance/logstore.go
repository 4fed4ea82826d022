package instance

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	logSuffix = ".log"
	// maxFunctionsLogged bounds the functions of which logs are kept; those that wrote least recently go first.
	maxFunctionsLogged = 500
)

// logStore knows the files that Functions write to: ROOT/logs/FUNCTION/INSTANCE.log. The shim appends to them; the engine
// empties one that grows too large, and removes the oldest of those whose Instance has gone.
type logStore struct {
	root     string
	kept     int
	maxBytes int64
}

// logFile is one, as it was found.
type logFile struct {
	instance, path string
	changed        time.Time
	bytes          int64
}

func (l *logStore) base() string { return filepath.Join(l.root, "logs") }

// dir is where a Function's logs are; its name has been checked.
func (l *logStore) dir(function string) string { return filepath.Join(l.base(), function) }

// runtimePrefix begins the names of Runtimes' logs; no Function's name has a dot.
const runtimePrefix = "runtime."

// runtimeLog names the log of what a Runtime says while it boots and waits.
func runtimeLog(runtime string) string { return runtimePrefix + runtime }

// keep appends what is in an Instance's output file to the log of a Runtime, and empties the file; the shim goes on at its
// beginning. So the Function that comes has a log of its own.
func (l *logStore) keep(name, instance, output string) error {
	from, err := os.OpenFile(output, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("log of instance %s: %w", instance, err)
	}
	defer from.Close()
	if info, err := from.Stat(); err != nil || info.Size() == 0 {
		return err
	}
	path := filepath.Join(l.dir(name), instance+logSuffix)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("log of instance %s: %w", instance, err)
	}
	to, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("log of instance %s: %w", instance, err)
	}
	_, err = io.Copy(to, io.LimitReader(from, l.maxBytes))
	if err := errors.Join(err, to.Close(), from.Truncate(0)); err != nil {
		return fmt.Errorf("log of instance %s: %w", instance, err)
	}
	return nil
}

// claim makes a Function's log of the file that an Instance's output goes to, and returns its path.
func (l *logStore) claim(function, instance, output string) (string, error) {
	path := filepath.Join(l.dir(function), instance+logSuffix)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", fmt.Errorf("log of instance %s: %w", instance, err)
	}
	if err := os.Rename(output, path); err != nil {
		return "", fmt.Errorf("log of instance %s: %w", instance, err)
	}
	return path, nil
}

// files lists a Function's log files, oldest first; none is no error.
func (l *logStore) files(function string) ([]logFile, error) {
	entries, err := os.ReadDir(l.dir(function))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list logs of %s: %w", function, err)
	}
	var files []logFile
	for _, d := range entries {
		instance, ok := strings.CutSuffix(d.Name(), logSuffix)
		info, err := d.Info()
		if !ok || err != nil { // removed meanwhile
			continue
		}
		files = append(files, logFile{
			instance: instance, path: filepath.Join(l.dir(function), d.Name()), changed: info.ModTime(), bytes: info.Size(),
		})
	}
	slices.SortFunc(files, func(a, b logFile) int {
		return cmp.Or(a.changed.Compare(b.changed), cmp.Compare(a.instance, b.instance))
	})
	return files, nil
}

// prune removes the oldest files of Instances that are not live, until as many are left as are kept.
func (l *logStore) prune(function string, live func(instance string) bool) error {
	if function == "" {
		return nil
	}
	files, err := l.files(function)
	if err != nil {
		return err
	}
	files = slices.DeleteFunc(files, func(f logFile) bool { return live(f.instance) })
	for _, f := range files[:max(0, len(files)-l.kept)] {
		if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove old log: %w", err)
		}
	}
	return nil
}

// trim empties files that have grown too large, and removes the logs of Functions beyond the bound. The shim opens files for
// appending, so that it goes on at the beginning of an emptied one.
func (l *logStore) trim() error {
	functions, err := os.ReadDir(l.base())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	changed := map[string]time.Time{}
	var errs []error
	for _, d := range functions {
		files, err := l.files(d.Name())
		errs = append(errs, err)
		for _, f := range files {
			if f.bytes > l.maxBytes {
				errs = append(errs, os.Truncate(f.path, 0))
			}
			changed[d.Name()] = f.changed // the last is the newest
		}
	}
	slices.SortFunc(functions, func(a, b fs.DirEntry) int { return changed[a.Name()].Compare(changed[b.Name()]) })
	for _, d := range functions[:max(0, len(functions)-maxFunctionsLogged)] {
		errs = append(errs, os.RemoveAll(l.dir(d.Name())))
	}
	return errors.Join(errs...)
}
