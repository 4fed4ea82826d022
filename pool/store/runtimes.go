package store

import (
	"errors"
	"fmt"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// Runtime is all that is known of one name of Runtimes.
type Runtime struct {
	Name string
	// Generation is that of the last change. It outlives the Runtime, so that no generation of a name is ever used twice.
	Generation int64
	// Applied is as it was given, and nil for a name whose Runtime was deleted.
	Applied *hearthv1.Runtime
	// Image is the digest that Applied's image was resolved to; empty before.
	Image string
}

// Runtimes returns all of them, in the order of names.
func (s *Store) Runtimes() ([]Runtime, error) {
	var all []Runtime
	err := s.guard(func() error {
		return s.db.View(func(tx *bbolt.Tx) error {
			runtimes, images := tx.Bucket(runtimeBucket), tx.Bucket(imageBucket)
			if runtimes == nil || images == nil {
				return nil // a file of before there were Runtimes
			}
			return runtimes.ForEach(func(name, value []byte) error {
				r, err := decodeRuntime(string(name), value, images.Get(name))
				all = append(all, r)
				return err
			})
		})
	})
	if err != nil {
		return nil, s.corrupt(err)
	}
	return all, nil
}

// PutRuntime stores a Runtime, or that it was deleted. It is durable when PutRuntime returns.
func (s *Store) PutRuntime(r Runtime) error {
	value, image, err := encodeRuntime(r)
	if err != nil {
		return fmt.Errorf("store runtime %q: %w", r.Name, err)
	}
	return s.update(func(tx *bbolt.Tx) error {
		return errors.Join(tx.Bucket(runtimeBucket).Put([]byte(r.Name), value), tx.Bucket(imageBucket).Put([]byte(r.Name), image))
	})
}

// encodeRuntime makes the values of a Runtime; one without an image is one that was deleted.
func encodeRuntime(r Runtime) (value, image []byte, err error) {
	if r.Name == "" || r.Generation < 1 || r.Applied != nil && (r.Applied.GetName() != r.Name || r.Applied.GetImage() == "") {
		return nil, nil, errors.New("a runtime needs a name, a generation and an image")
	}
	message := &hearthv1.Runtime{Name: r.Name}
	if r.Applied != nil {
		message = proto.CloneOf(r.Applied)
	}
	message.Generation = r.Generation
	out, err := proto.Marshal(message)
	return seal(out), seal([]byte(r.Image)), err
}

// decodeRuntime is the inverse of encodeRuntime.
func decodeRuntime(name string, value, image []byte) (Runtime, error) {
	message := &hearthv1.Runtime{}
	if err := decodeMessage(value, message); err != nil {
		return Runtime{}, fmt.Errorf("runtime %q: %w", name, err)
	}
	resolved, err := open(image)
	if err != nil {
		return Runtime{}, fmt.Errorf("image of runtime %q: %w", name, err)
	}
	if message.GetName() != name || message.GetGeneration() < 1 {
		return Runtime{}, fmt.Errorf("runtime %q holds %q of generation %d", name, message.GetName(), message.GetGeneration())
	}
	r := Runtime{Name: name, Generation: message.GetGeneration(), Image: string(resolved)}
	if message.GetImage() != "" {
		r.Applied = message
	}
	return r, nil
}
