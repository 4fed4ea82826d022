// Package store keeps on disk what poolmanager must not forget: Functions, their current Revisions, Runtimes, the number of the last
// Revision of every name that was ever used, and the term (epoch). Claims and Instances are not here: the nodes know them.
//
// It is bbolt because that is one file without a server, whose commit is one fsync'ed page that either counts or does not:
// kill -9 at any moment leaves the state before or after a change, never between. It takes a file lock, so that two
// poolmanagers cannot work on one store. Writes are rare (a deploy, a start), which is where bbolt is slow, and at a start
// everything is read once. Each value carries a checksum, as bbolt itself checks only its root pages.
package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// ErrCorrupt matches, through errors.Is, an error that says that the file's content cannot be trusted.
var ErrCorrupt = errors.New("corrupt store")

const (
	// format is what this code writes; another number is another layout.
	format      = 1
	lockTimeout = 2 * time.Second
)

var (
	metaBucket     = []byte("meta")
	functionBucket = []byte("functions")
	revisionBucket = []byte("revisions")
	serialBucket   = []byte("serials")
	runtimeBucket  = []byte("runtimes")
	imageBucket    = []byte("runtime-images")
	formatKey      = []byte("format")
	epochKey       = []byte("epoch")
)

// Record is all that is known of one name.
type Record struct {
	Name string
	// Serial is the number of the last Revision of this name. It outlives the Function, so that no Revision's name is ever used twice.
	Serial int64
	// Function and Revision are nil for a name whose Function was deleted.
	Function *hearthv1.Function
	Revision *hearthv1.Revision
}

// Store is an open file. Safe for concurrent use.
type Store struct {
	db   *bbolt.DB
	path string
}

// Open opens the file at path, and makes it (with its directory) if there is none. It reads everything once, so that a damaged
// file is noticed now and not in the middle of the work. Errors: ErrCorrupt, or that another process has it open.
func Open(path string) (*Store, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the store's directory: %w", err)
	}
	s := &Store{path: path}
	err := s.guard(func() (err error) {
		s.db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout})
		return err
	})
	switch {
	case errors.Is(err, bbolt.ErrTimeout):
		return nil, fmt.Errorf("open store %s: another process has it open; stop the other poolmanager first", path)
	case err != nil && (errors.Is(err, fs.ErrPermission) || errors.As(err, new(*fs.PathError))):
		return nil, fmt.Errorf("open store %s: %w", path, err)
	case err != nil:
		return nil, s.corrupt(err)
	}
	if err := s.prepare(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// prepare checks a file that has content, and gives a new one its buckets.
func (s *Store) prepare() error {
	if _, err := s.Records(); err != nil {
		return err
	}
	if _, err := s.Runtimes(); err != nil {
		return err
	}
	return s.update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{metaBucket, functionBucket, revisionBucket, serialBucket, runtimeBucket, imageBucket} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return fmt.Errorf("make bucket %s: %w", name, err)
			}
		}
		return tx.Bucket(metaBucket).Put(formatKey, encodeNumber(format))
	})
}

// BeginTerm begins a new term of office, and returns its number: greater than every one before it and than after. It is durable
// when it returns, so that no two terms ever have the same number.
func (s *Store) BeginTerm(after int64) (int64, error) {
	var epoch int64
	err := s.update(func(tx *bbolt.Tx) error {
		last, err := decodeNumber(tx.Bucket(metaBucket).Get(epochKey))
		if err != nil {
			return fmt.Errorf("epoch: %w", err)
		}
		epoch = max(last, after) + 1
		return tx.Bucket(metaBucket).Put(epochKey, encodeNumber(epoch))
	})
	return epoch, err
}

// Records returns everything, in the order of names.
func (s *Store) Records() ([]Record, error) {
	var records []Record
	err := s.guard(func() error {
		return s.db.View(func(tx *bbolt.Tx) error {
			serials := tx.Bucket(serialBucket)
			if serials == nil {
				return nil
			}
			if err := checkFormat(tx); err != nil {
				return err
			}
			return serials.ForEach(func(name, serial []byte) error {
				r, err := decodeRecord(string(name), serial, tx.Bucket(functionBucket).Get(name), tx.Bucket(revisionBucket).Get(name))
				records = append(records, r)
				return err
			})
		})
	})
	if err != nil {
		return nil, s.corrupt(err)
	}
	return records, nil
}

func checkFormat(tx *bbolt.Tx) error {
	for _, name := range [][]byte{metaBucket, functionBucket, revisionBucket} {
		if tx.Bucket(name) == nil {
			return fmt.Errorf("bucket %s is missing", name)
		}
	}
	if _, err := decodeNumber(tx.Bucket(metaBucket).Get(epochKey)); err != nil {
		return fmt.Errorf("epoch: %w", err)
	}
	n, err := decodeNumber(tx.Bucket(metaBucket).Get(formatKey))
	if err != nil {
		return fmt.Errorf("format: %w", err)
	}
	if n != format {
		return fmt.Errorf("its format is %d and this program knows %d", n, format)
	}
	return nil
}

// Put stores a Function with its Revision. It is durable when Put returns.
func (s *Store) Put(r Record) error {
	if r.Name == "" || r.Function == nil || r.Revision == nil {
		return fmt.Errorf("store function %q: a record needs a name, a function and a revision", r.Name)
	}
	values, err := encodeRecord(r)
	if err != nil {
		return fmt.Errorf("store function %s: %w", r.Name, err)
	}
	return s.update(func(tx *bbolt.Tx) error {
		key := []byte(r.Name)
		if err := tx.Bucket(functionBucket).Put(key, values.function); err != nil {
			return fmt.Errorf("store function %s: %w", r.Name, err)
		}
		if err := tx.Bucket(revisionBucket).Put(key, values.revision); err != nil {
			return fmt.Errorf("store revision %s: %w", r.Revision.GetName(), err)
		}
		return tx.Bucket(serialBucket).Put(key, values.serial)
	})
}

// Delete forgets a Function; its serial stays. An unknown name is no error.
func (s *Store) Delete(name string) error {
	return s.update(func(tx *bbolt.Tx) error {
		return errors.Join(tx.Bucket(functionBucket).Delete([]byte(name)), tx.Bucket(revisionBucket).Delete([]byte(name)))
	})
}

// Close waits for calls in flight and frees the file.
func (s *Store) Close() error {
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("close store %s: %w", s.path, err)
	}
	return nil
}

func (s *Store) update(change func(*bbolt.Tx) error) error {
	err := s.guard(func() error { return s.db.Update(change) })
	if err != nil {
		return fmt.Errorf("write store %s: %w", s.path, err)
	}
	return nil
}

func (s *Store) corrupt(err error) error {
	return fmt.Errorf("%w %s: %w; move the file away and deploy the functions again, or put a copy of it in its place",
		ErrCorrupt, s.path, err)
}

// guard turns a panic of bbolt, or a fault in the mapped file, into an error: that is how it answers damaged pages.
func (s *Store) guard(work func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrCorrupt, r)
		}
	}()
	return work()
}

func encodeNumber(n int64) []byte { return seal(binary.BigEndian.AppendUint64(nil, uint64(n))) }
