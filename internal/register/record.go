package register

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Names in the state folder.
const (
	recordName   = "registration.json"
	originalName = "original" // the main file as it was before it was edited
)

// maxFileBytes bounds a file that is edited, and the record.
const maxFileBytes = 1 << 20

// record is what was changed, so that it can be undone. It is written before anything is.
type record struct {
	Version int       `json:"version"`
	DropIn  written   `json:"dropIn"`
	Main    *edit     `json:"main,omitempty"`
	Folders []string  `json:"folders,omitempty"` // made for the drop-in, the outermost first
	Times   []folderT `json:"times,omitempty"`   // of folders as they were
}

// written is a file by what it was written with.
type written struct {
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
}

// edit is a line that was added to a file. What it was before is in a file beside the record.
type edit struct {
	written        // as edited
	Added   string `json:"added"`
	Before  stat   `json:"before"`
}

// stat is what a file had besides its bytes.
type stat struct {
	Mode     uint32    `json:"mode"`
	UID      int       `json:"uid"`
	GID      int       `json:"gid"`
	Accessed time.Time `json:"accessed"`
	Modified time.Time `json:"modified"`
	SHA256   string    `json:"sha256"`
}

// folderT is when a folder was changed last.
type folderT struct {
	Path     string    `json:"path"`
	Accessed time.Time `json:"accessed"`
	Modified time.Time `json:"modified"`
}

func sum(text []byte) string {
	s := sha256.Sum256(text)
	return hex.EncodeToString(s[:])
}

// readRecord returns nil if nothing is recorded.
func readRecord(dir string) (*record, error) {
	data, err := readBounded(filepath.Join(dir, recordName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("what was registered: %w", err)
	}
	r, err := parseRecord(data)
	if err != nil {
		return nil, fmt.Errorf("what was registered, %s: %w", filepath.Join(dir, recordName), err)
	}
	return r, nil
}

func parseRecord(data []byte) (*record, error) {
	r := &record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, err
	}
	if r.Version != 1 {
		return nil, fmt.Errorf("version %d is none that this program knows", r.Version)
	}
	paths := append([]string{r.DropIn.Path}, r.Folders...)
	if r.Main != nil {
		paths = append(paths, r.Main.Path)
	}
	for _, t := range r.Times {
		paths = append(paths, t.Path)
	}
	for _, path := range paths {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			return nil, fmt.Errorf("%q is no clean absolute path", path)
		}
	}
	return r, nil
}

func (r *record) write(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, recordName), append(data, '\n'), 0o600)
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err == nil && len(data) > maxFileBytes {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxFileBytes)
	}
	return data, err
}

// writeFile puts a file in place at once, durably.
func writeFile(path string, text []byte, mode fs.FileMode, adjust ...func(*os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".hearth-*") // no pattern for configuration takes it in
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(text)
	err = errors.Join(err, f.Chmod(mode))
	for _, a := range adjust {
		err = errors.Join(err, a(f))
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// statOf is what there is to a file besides its bytes.
func statOf(path string, text []byte) (stat, error) {
	info, err := os.Stat(path)
	if err != nil {
		return stat{}, err
	}
	sys, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return stat{}, fmt.Errorf("stat %s: no owner", path)
	}
	return stat{
		Mode: sys.Mode & 0o7777, UID: int(sys.Uid), GID: int(sys.Gid), SHA256: sum(text),
		Accessed: time.Unix(sys.Atim.Unix()), Modified: info.ModTime(),
	}, nil
}

// replace puts other bytes in a file's place, which keeps its owner, mode and attributes, as SELinux's. The times are restored if
// the bytes are those from before.
func (s stat) replace(path string, text []byte) error {
	attributes, err := readAttributes(path)
	if err != nil {
		return fmt.Errorf("attributes of %s: %w", path, err)
	}
	err = writeFile(path, text, 0o600, func(f *os.File) error {
		err := errors.Join(f.Chown(s.UID, s.GID), unix.Fchmod(int(f.Fd()), s.Mode))
		for name, value := range attributes {
			err = errors.Join(err, unix.Fsetxattr(int(f.Fd()), name, value, 0))
		}
		return err
	})
	if err != nil || sum(text) != s.SHA256 {
		return err
	}
	return os.Chtimes(path, s.Accessed, s.Modified)
}

func readAttributes(path string) (map[string][]byte, error) {
	buf := make([]byte, 64<<10) // the kernel's own bound for both
	n, err := unix.Listxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	attributes := map[string][]byte{}
	for _, name := range splitZero(buf[:n]) {
		value := make([]byte, 64<<10)
		n, err := unix.Getxattr(path, name, value)
		if err != nil {
			return nil, err
		}
		attributes[name] = value[:n]
	}
	return attributes, nil
}

func splitZero(b []byte) (words []string) {
	for start, i := 0, 0; i < len(b); i++ {
		if b[i] == 0 {
			words = append(words, string(b[start:i]))
			start = i + 1
		}
	}
	return words
}

// timesOf notes when folders were changed last; those that are not there are left out.
func timesOf(paths ...string) []folderT {
	var times []folderT
	for _, path := range paths {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			times = append(times, folderT{path, time.Unix(st.Atim.Unix()), time.Unix(st.Mtim.Unix())})
		}
	}
	return times
}
