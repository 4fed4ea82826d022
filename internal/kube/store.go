package kube

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool/store"
)

const (
	// serialsName is a ConfigMap with the last serials of names that are not there any more, so that none is used twice.
	serialsName = "hearth-serials"
	// acceptedAnnotation has on a Runtime what the pool took over last.
	acceptedAnnotation = "hearth.dev/accepted"
	// keptRevisions of a Function stay to be read; older ones are deleted.
	keptRevisions = 10
	storeCall     = 10 * time.Second
)

// records is the pool's Store on the API server: Functions and Revisions are objects of these kinds, and the term is the Lease's. Everything
// is read from the API server itself, for a cache may be behind what the last term wrote.
type records struct {
	api       client.Client
	live      client.Reader
	namespace string
	term      *Term
	call      func() (context.Context, context.CancelFunc)

	mu   sync.Mutex
	last map[string]int64 // serials by Function, for when its Revisions have gone before it is deleted here
}

func newRecords(ctx context.Context, api client.Client, live client.Reader, namespace string, term *Term) *records {
	return &records{api: api, live: live, namespace: namespace, term: term, last: map[string]int64{}, call: func() (context.Context, context.CancelFunc) {
		return context.WithTimeout(context.WithoutCancel(ctx), storeCall)
	}}
}

// BeginTerm implements pool.Store.
func (s *records) BeginTerm(after int64) (int64, error) {
	if after == 0 {
		return s.term.Epoch, nil
	}
	ctx, cancel := s.call()
	defer cancel()
	return after + 1, s.term.raise(ctx, after)
}

// Records implements pool.Store.
func (s *records) Records() ([]store.Record, error) {
	ctx, cancel := s.call()
	defer cancel()
	serials, err := s.serials(ctx, "function.")
	if err != nil {
		return nil, err
	}
	var functions crd.FunctionList
	var revisions crd.RevisionList
	var secrets corev1.SecretList
	in := client.InNamespace(s.namespace)
	err = errors.Join(s.live.List(ctx, &functions, in), s.live.List(ctx, &revisions, in), s.live.List(ctx, &secrets, in, client.HasLabels{crd.LabelRevision}))
	if err != nil {
		return nil, err
	}
	files := map[string]map[string][]byte{}
	for i := range secrets.Items {
		files[secrets.Items[i].Name] = secrets.Items[i].Data
	}
	newest := map[types.UID]*crd.Revision{} // by Function
	for i := range revisions.Items {
		r := &revisions.Items[i]
		n := serialOf(r)
		serials[r.Spec.Function] = max(serials[r.Spec.Function], n)
		if o := metav1.GetControllerOf(r); o != nil && n > 0 && (newest[o.UID] == nil || n > serialOf(newest[o.UID])) {
			newest[o.UID] = r
		}
	}
	all := map[string]store.Record{}
	for name, n := range serials {
		s.note(name, n)
		all[name] = store.Record{Name: name, Serial: n}
	}
	for i := range functions.Items {
		f := &functions.Items[i]
		if r := newest[f.UID]; r != nil && f.DeletionTimestamp == nil {
			all[f.Name] = record(f, r, serials[f.Name], files[r.Spec.SecretName])
		}
	}
	out := make([]store.Record, 0, len(all))
	for _, r := range all {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b store.Record) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}

// record is a Function as it was accepted last.
func record(f *crd.Function, r *crd.Revision, serial int64, secrets map[string][]byte) store.Record {
	return store.Record{Name: f.Name, Serial: serial, Revision: Revision(r, secrets), Function: &hearthv1.Function{
		Name: f.Name, Spec: AcceptedSpec(&f.Spec, r, secrets), Status: &hearthv1.FunctionStatus{Generation: max(1, f.Status.ObservedGeneration), Revision: r.Name,
			CreatedAt: timestamppb.New(f.CreationTimestamp.Time), UpdatedAt: timestamppb.New(r.CreationTimestamp.Time)}}}
}

// serialOf is the number at the end of a Revision's name, or 0.
func serialOf(r *crd.Revision) int64 {
	digits, ok := strings.CutPrefix(r.Name, r.Spec.Function+"-")
	n, err := strconv.ParseInt(digits, 10, 62)
	if !ok || err != nil || n < 0 {
		return 0
	}
	return n
}

// Put implements pool.Store: it makes the Revision if it is a new one, and otherwise notes what its image was resolved to. The Function's own
// status is its controller's.
func (s *records) Put(r store.Record) error {
	s.note(r.Name, r.Serial)
	ctx, cancel := s.call()
	defer cancel()
	var have crd.Revision
	err := s.live.Get(ctx, s.key(r.Revision.GetName()), &have)
	switch {
	case apierrors.IsNotFound(err):
		return s.create(ctx, r)
	case err != nil:
		return fmt.Errorf("read revision %s: %w", r.Revision.GetName(), err)
	}
	if !s.same(&have, r) {
		return fmt.Errorf("revision %s is there with other content, as of a function that was deleted; it is tried again", have.Name)
	}
	if image := r.Revision.GetImage(); image != r.Function.GetSpec().GetImage() && image != have.Status.Image {
		have.Status.Image, have.Status.ObservedGeneration = image, have.Generation
		if err := s.api.Status().Update(ctx, &have); err != nil {
			return fmt.Errorf("note the image of revision %s: %w", have.Name, err)
		}
	}
	return s.putSecret(ctx, &have, r.Revision.GetSecrets())
}

func (s *records) key(name string) types.NamespacedName {
	return types.NamespacedName{Namespace: s.namespace, Name: name}
}

func (s *records) same(have *crd.Revision, r store.Record) bool {
	want := RevisionSpec(r.Revision, r.Function.GetSpec().GetImage(), have.Name)
	return have.DeletionTimestamp == nil && apiequality.Semantic.DeepEqual(have.Spec, want)
}

func (s *records) create(ctx context.Context, r store.Record) error {
	var f crd.Function
	if err := s.live.Get(ctx, s.key(r.Name), &f); err != nil {
		return fmt.Errorf("read function %s: %w", r.Name, err)
	}
	name := r.Revision.GetName()
	made := &crd.Revision{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name, Labels: map[string]string{crd.LabelFunction: r.Name, managedLabel: managedBy},
			OwnerReferences: []metav1.OwnerReference{ownedBy("Function", f.Name, f.UID)}},
		Spec: RevisionSpec(r.Revision, r.Function.GetSpec().GetImage(), name),
	}
	if err := s.api.Create(ctx, made); err != nil {
		return fmt.Errorf("create revision %s: %w", name, err)
	}
	if err := s.putSecret(ctx, made, r.Revision.GetSecrets()); err != nil {
		return err
	}
	return s.trim(ctx, &f, serialOf(made))
}

// putSecret keeps the secrets of a Revision, which are as they were when it was made.
func (s *records) putSecret(ctx context.Context, r *crd.Revision, files map[string][]byte) error {
	if len(files) == 0 {
		return nil
	}
	yes := true
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: r.Spec.SecretName, OwnerReferences: []metav1.OwnerReference{ownedBy("Revision", r.Name, r.UID)},
			Labels: map[string]string{crd.LabelRevision: r.Name, crd.LabelFunction: r.Spec.Function, managedLabel: managedBy}},
		Immutable: &yes, Data: files,
	}
	if err := s.api.Create(ctx, secret); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create the secret of revision %s: %w", r.Name, err)
	}
	return nil
}

// trim deletes a Function's oldest Revisions.
func (s *records) trim(ctx context.Context, f *crd.Function, newest int64) error {
	var all crd.RevisionList
	if err := s.api.List(ctx, &all, client.InNamespace(s.namespace), client.MatchingLabels{crd.LabelFunction: f.Name}); err != nil {
		return fmt.Errorf("list revisions of %s: %w", f.Name, err)
	}
	for i := range all.Items {
		if r := &all.Items[i]; metav1.IsControlledBy(r, f) && serialOf(r) <= newest-keptRevisions {
			if err := s.api.Delete(ctx, r); client.IgnoreNotFound(err) != nil {
				return fmt.Errorf("delete old revision %s: %w", r.Name, err)
			}
		}
	}
	return nil
}

// Delete implements pool.Store: the Function's object is gone already, and its Revisions go with it. What stays is the serial.
func (s *records) Delete(name string) error {
	ctx, cancel := s.call()
	defer cancel()
	var all crd.RevisionList
	if err := s.api.List(ctx, &all, client.InNamespace(s.namespace), client.MatchingLabels{crd.LabelFunction: name}); err != nil {
		return fmt.Errorf("list revisions of %s: %w", name, err)
	}
	last := s.note(name, 0)
	for i := range all.Items {
		last = max(last, serialOf(&all.Items[i]))
	}
	return s.keepSerial(ctx, "function."+name, last)
}

// note remembers the greatest serial of a name.
func (s *records) note(name string, serial int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last[name] = max(s.last[name], serial)
	return s.last[name]
}

// serials are those of names that were deleted, without a prefix.
func (s *records) serials(ctx context.Context, prefix string) (map[string]int64, error) {
	var c corev1.ConfigMap
	out := map[string]int64{}
	if err := s.live.Get(ctx, s.key(serialsName), &c); err != nil {
		return out, client.IgnoreNotFound(err)
	}
	for key, text := range c.Data {
		name, ok := strings.CutPrefix(key, prefix)
		n, err := strconv.ParseInt(text, 10, 62)
		if ok && err == nil && n > 0 {
			out[name] = n
		}
	}
	return out, nil
}

func (s *records) keepSerial(ctx context.Context, key string, n int64) error {
	if n == 0 {
		return nil
	}
	c := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: serialsName}}
	data := map[string]string{key: strconv.FormatInt(n, 10)}
	err := s.api.Patch(ctx, c, client.RawPatch(types.MergePatchType, encode(map[string]any{"data": data})))
	if apierrors.IsNotFound(err) {
		c.Data = data
		err = s.api.Create(ctx, c)
	}
	if err != nil {
		return fmt.Errorf("keep the serial of %s: %w", key, err)
	}
	return nil
}

// takenOver is what the pool took over of a Runtime.
type takenOver struct {
	Generation int64  `json:"generation"`
	Image      string `json:"image,omitempty"`
	Spec       string `json:"spec"` // digest
}

func digestOf(r *crd.RuntimeSpec) string {
	sum := sha256.Sum256(encode(r))
	return hex.EncodeToString(sum[:])
}

// acceptedOf reads what was noted on a Runtime. Anybody may have written it: what is not ours says nothing, which costs what is warm.
func acceptedOf(r *crd.Runtime, deleted int64) takenOver {
	var was takenOver
	if json.Unmarshal([]byte(r.Annotations[acceptedAnnotation]), &was) != nil || was.Generation <= 0 || was.Generation > maxEpoch {
		return takenOver{Generation: deleted}
	}
	return was
}

// Runtimes implements pool.Store. One that was changed while nobody led has the generation that it is going to get.
func (s *records) Runtimes() ([]store.Runtime, error) {
	ctx, cancel := s.call()
	defer cancel()
	deleted, err := s.serials(ctx, "runtime.")
	if err != nil {
		return nil, err
	}
	var all crd.RuntimeList
	if err := s.live.List(ctx, &all, client.InNamespace(s.namespace)); err != nil {
		return nil, err
	}
	var out []store.Runtime
	for i := range all.Items {
		r := &all.Items[i]
		if r.DeletionTimestamp != nil {
			continue
		}
		was := acceptedOf(r, deleted[r.Name])
		one := store.Runtime{Name: r.Name, Generation: was.Generation, Image: was.Image, Applied: RuntimeMessage(r)}
		if was.Spec != digestOf(&r.Spec) {
			one.Generation, one.Image = was.Generation+1, ""
		}
		one.Applied.Generation = one.Generation
		delete(deleted, r.Name)
		out = append(out, one)
	}
	for name, n := range deleted {
		out = append(out, store.Runtime{Name: name, Generation: n})
	}
	return out, nil
}

// PutRuntime implements pool.Store.
func (s *records) PutRuntime(r store.Runtime) error {
	ctx, cancel := s.call()
	defer cancel()
	if r.Applied == nil {
		return s.keepSerial(ctx, "runtime."+r.Name, r.Generation)
	}
	spec := RuntimeResource(r.Applied)
	note := encode(takenOver{Generation: r.Generation, Image: r.Image, Spec: digestOf(&spec)})
	patch := encode(map[string]any{"metadata": map[string]any{"annotations": map[string]string{acceptedAnnotation: string(note)}}})
	target := &crd.Runtime{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: r.Name}}
	if err := s.api.Patch(ctx, target, client.RawPatch(types.MergePatchType, patch)); err != nil {
		return fmt.Errorf("note what was accepted of runtime %s: %w", r.Name, err)
	}
	return nil
}
