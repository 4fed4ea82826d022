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

	"github.com/hearth-serverless/hearth/internal/logfile"
)

const (
	logSuffix = ".log"
	// maxFunctionsLogged bounds the functions of which logs are kept; those that wrote least recently go first.
	maxFunctionsLogged = 500
)

// logStore knows the files that Functions write to: ROOT/logs/FUNCTION/INSTANCE.log. Each has a logwriter, which appends to it and
// bounds it; the engine removes the oldest of those whose Instance has gone.
type logStore struct {
	root string
	kept int
}

// logFile is one, as it was found.
type logFile struct {
	instance, path string
	changed        time.Time
}

func (l *logStore) base() string { return filepath.Join(l.root, "logs") }

// dir is where a Function's logs are; its name has been checked.
func (l *logStore) dir(function string) string { return filepath.Join(l.base(), function) }

// runtimePrefix begins the names of Runtimes' logs; no Function's name has a dot.
const runtimePrefix = "runtime."

// runtimeLog names the log of what a Runtime says while it boots and waits.
func runtimeLog(runtime string) string { return runtimePrefix + runtime }

// keep appends what is in an Instance's output file to the log of a Runtime, and empties the file; its writer goes on at
// the beginning. So the Function that comes has a log of its own.
func (l *logStore) keep(name, instance, output string) error {
	from, err := os.OpenFile(output, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("log of instance %s: %w", instance, err)
	}
	defer from.Close()
	info, err := from.Stat()
	if err != nil || info.Size() == 0 {
		return err
	}
	start, err := logfile.Start(from, 0)
	if err != nil {
		return fmt.Errorf("log of instance %s: %w", instance, err)
	}
	path := filepath.Join(l.dir(name), instance+logSuffix)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("log of instance %s: %w", instance, err)
	}
	to, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("log of instance %s: %w", instance, err)
	}
	_, err = io.Copy(to, io.NewSectionReader(from, start, info.Size()-start))
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
			instance: instance, path: filepath.Join(l.dir(function), d.Name()), changed: info.ModTime(),
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

// trim removes the logs of Functions beyond the bound.
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
			changed[d.Name()] = f.changed // the last is the newest
		}
	}
	slices.SortFunc(functions, func(a, b fs.DirEntry) int { return changed[a.Name()].Compare(changed[b.Name()]) })
	for _, d := range functions[:max(0, len(functions)-maxFunctionsLogged)] {
		errs = append(errs, os.RemoveAll(l.dir(d.Name())))
	}
	return errors.Join(errs...)
}
