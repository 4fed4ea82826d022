// Package kubetest is an API server in memory, for tests of what speaks to one: it keeps objects of any kind, applies, selects and watches
// them, has logs of pods and forwards their ports. It knows no schema, no defaults and no rights: what those do is tried on a real one.
package kubetest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
)

// Server is an API server.
type Server struct {
	// OnWrite, if it is set before the first request, makes of an object that was applied what controllers would.
	OnWrite func(*unstructured.Unstructured)
	// Denied are what reviews of access refuse: "VERB RESOURCE[/SUBRESOURCE]".
	Denied []string
	// Logs of pods by name.
	Logs map[string]string
	// Ports are where forwarded ports of pods lead: HOST:PORT by name.
	Ports map[string]string

	url string

	mu      sync.Mutex // guards what is below
	objects map[string]*unstructured.Unstructured
	events  []event
	changed chan struct{} // closed and made anew at each event
	asked   []string
}

// event is a change of an object. A side that is nil was, or is, not there.
type event struct{ old, now *unstructured.Unstructured }

// New starts an API server that ends with the test.
func New(t *testing.T) *Server {
	s := &Server{objects: map[string]*unstructured.Unstructured{}, changed: make(chan struct{}), Logs: map[string]string{}, Ports: map[string]string{}}
	web := httptest.NewServer(s)
	s.url = web.URL
	t.Cleanup(func() {
		web.CloseClientConnections()
		web.Close()
	})
	return s
}

// URL is where it listens.
func (s *Server) URL() string { return s.url }

// Kubeconfig writes a kubeconfig whose current context, test, is this server.
func (s *Server) Kubeconfig(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: test\ncontexts: [{name: test, context: {cluster: test, user: test}}]\n"+
		"clusters: [{name: test, cluster: {server: %q}}]\nusers: [{name: test, user: {}}]\n", s.url)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// Put stores an object at its path, like /api/v1/namespaces/hearth/pods/i-1, as if somebody had written it.
func (s *Server) Put(path string, object any) {
	data, err := json.Marshal(object)
	u := &unstructured.Unstructured{}
	if err == nil {
		err = json.Unmarshal(data, &u.Object)
	}
	if err != nil {
		panic(err) // of the test
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store(path, u)
}

// Get is the object at a path, or nil.
func (s *Server) Get(path string) *unstructured.Unstructured {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.objects[path].DeepCopy()
}

// Change changes the object at a path, if there is one.
func (s *Server) Change(path string, change func(*unstructured.Unstructured)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.objects[path]; old != nil {
		now := old.DeepCopy()
		change(now)
		s.store(path, now)
	}
}

// Remove deletes what is at a path.
func (s *Server) Remove(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(path)
}

// Paths are those of all objects.
func (s *Server) Paths() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.objects))
}

// Writes are the requests that wanted to change something, METHOD PATH, in order.
func (s *Server) Writes() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

// store keeps an object as the API server would: with versions, and what it had that the writer does not say.
func (s *Server) store(path string, now *unstructured.Unstructured) {
	old := s.objects[path]
	if now.GetName() == "" {
		now.SetName(path[strings.LastIndexByte(path, '/')+1:])
	}
	now.SetUID(types.UID("uid-of-" + path))
	now.SetResourceVersion(strconv.Itoa(len(s.events) + 1))
	if created := now.GetCreationTimestamp(); created.IsZero() {
		now.SetCreationTimestamp(metav1.Now())
	}
	if old != nil {
		now.SetCreationTimestamp(old.GetCreationTimestamp())
		if status, ok := old.Object["status"]; ok && now.Object["status"] == nil {
			now.Object["status"] = status
		}
		now.SetGeneration(old.GetGeneration())
	}
	if old == nil || !reflect.DeepEqual(old.Object["spec"], now.Object["spec"]) {
		now.SetGeneration(now.GetGeneration() + 1)
	}
	s.objects[path] = now
	s.tell(event{old, now})
}

func (s *Server) drop(path string) {
	if old := s.objects[path]; old != nil {
		delete(s.objects, path)
		s.tell(event{old, nil})
		if strings.HasPrefix(path, "/api/v1/namespaces/") && strings.Count(path, "/") == 4 {
			s.dropBelow(path[strings.LastIndexByte(path, '/')+1:])
		}
	}
}

// dropBelow deletes what is in a namespace.
func (s *Server) dropBelow(namespace string) {
	for path := range s.objects {
		if strings.Contains(path, "/namespaces/"+namespace+"/") {
			s.drop(path)
		}
	}
}

func (s *Server) tell(e event) {
	s.events = append(s.events, e)
	close(s.changed)
	s.changed = make(chan struct{})
}

// ServeHTTP is the API.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && !strings.HasSuffix(r.URL.Path, "/portforward") && !strings.HasSuffix(r.URL.Path, "reviews") {
		s.mu.Lock()
		s.asked = append(s.asked, r.Method+" "+r.URL.Path)
		s.mu.Unlock()
	}
	name, sub := target(r.URL.Path)
	switch {
	case r.URL.Path == "/version":
		answer(w, map[string]any{"major": "1", "minor": "37"})
	case strings.HasSuffix(r.URL.Path, "/selfsubjectaccessreviews"):
		s.review(w, r)
	case sub == "log":
		s.log(w, name)
	case sub == "portforward":
		s.forward(w, r, name)
	case r.Method == http.MethodGet && name == "" && r.URL.Query().Get("watch") != "":
		s.watch(w, r)
	case r.Method == http.MethodGet && name == "":
		s.list(w, r)
	case r.Method == http.MethodDelete:
		s.delete(w, r, name)
	default:
		s.one(w, r, name)
	}
}

// target is the name of the object that a path leads to, or nothing for a collection, and its subresource.
func target(path string) (name, sub string) {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	if len(parts) > 0 && parts[0] == "api" {
		parts = parts[min(2, len(parts)):]
	} else {
		parts = parts[min(3, len(parts)):]
	}
	if len(parts) > 2 && parts[0] == "namespaces" {
		parts = parts[2:]
	}
	if len(parts) > 1 {
		name = parts[1]
	}
	if len(parts) > 2 {
		sub = parts[2]
	}
	return name, sub
}

// one reads or writes one object.
func (s *Server) one(w http.ResponseWriter, r *http.Request, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Method != http.MethodGet {
		body, err := io.ReadAll(r.Body)
		u := &unstructured.Unstructured{}
		if err == nil {
			err = json.Unmarshal(body, &u.Object)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		path := r.URL.Path
		if name == "" {
			path += "/" + u.GetName()
		}
		s.store(path, u)
		if s.OnWrite != nil {
			s.OnWrite(u)
		}
		answer(w, u.Object)
		return
	}
	object := s.objects[r.URL.Path]
	if object == nil {
		notFound(w, r.URL.Path, name)
		return
	}
	answer(w, object.Object)
}

func (s *Server) delete(w http.ResponseWriter, r *http.Request, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name != "" {
		if s.objects[r.URL.Path] == nil {
			notFound(w, r.URL.Path, name)
			return
		}
		s.drop(r.URL.Path)
	} else {
		match := selector(r)
		for path, object := range s.objects {
			if collection(path) == r.URL.Path && match(object) {
				s.drop(path)
			}
		}
	}
	answer(w, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Success"})
}

func (s *Server) list(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	items, match := []any{}, selector(r)
	for _, path := range slices.Sorted(maps.Keys(s.objects)) {
		if collection(path) == r.URL.Path && match(s.objects[path]) {
			items = append(items, s.objects[path].Object)
		}
	}
	kind, version := listOf(r.URL.Path)
	answer(w, map[string]any{"kind": kind, "apiVersion": version, "metadata": map[string]any{"resourceVersion": strconv.Itoa(len(s.events))}, "items": items})
}

// listKinds are the lists that are read as what they are, and so have to say it.
var listKinds = map[string]string{
	"functions": "FunctionList", "runtimes": "RuntimeList", "warmpools": "WarmPoolList", "pods": "PodList", "nodes": "NodeList", "events": "EventList",
	"customresourcedefinitions": "CustomResourceDefinitionList",
}

// listOf is the kind and version of the list at a path.
func listOf(path string) (kind, version string) {
	kind = listKinds[path[strings.LastIndexByte(path, '/')+1:]]
	parts := strings.Split(strings.Trim(path, "/"), "/")
	if parts[0] == "api" {
		return kind, parts[1]
	}
	return kind, parts[1] + "/" + parts[2]
}

// watch sends the changes of a collection since a version, until the client has gone.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) {
	since, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	match := selector(r)
	matches := func(u *unstructured.Unstructured) bool {
		return u != nil && strings.Contains(r.URL.Path, "/"+u.GetNamespace()+"/") && strings.HasSuffix(r.URL.Path, "/"+strings.ToLower(u.GetKind())+"s") && match(u)
	}
	w.Header().Set("Content-Type", "application/json")
	for {
		s.mu.Lock()
		news, changed := s.events[min(since, len(s.events)):], s.changed
		since = len(s.events)
		s.mu.Unlock()
		for _, e := range news {
			kind, object := "", e.now
			switch was, is := matches(e.old), matches(e.now); {
			case was && is:
				kind = "MODIFIED"
			case is:
				kind = "ADDED"
			case was:
				kind, object = "DELETED", e.old
			default:
				continue
			}
			_ = json.NewEncoder(w).Encode(map[string]any{"type": kind, "object": object.Object})
		}
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		select {
		case <-r.Context().Done():
			return
		case <-changed:
		case <-time.After(time.Minute):
			return
		}
	}
}

// selector is the query's selection by labels, and by name.
func selector(r *http.Request) func(*unstructured.Unstructured) bool {
	byLabel, err := labels.Parse(r.URL.Query().Get("labelSelector"))
	if err != nil {
		byLabel = labels.Nothing()
	}
	byField, err := fields.ParseSelector(r.URL.Query().Get("fieldSelector"))
	if err != nil {
		byField = fields.Nothing()
	}
	return func(u *unstructured.Unstructured) bool {
		involved, _, _ := unstructured.NestedString(u.Object, "involvedObject", "name")
		return byLabel.Matches(labels.Set(u.GetLabels())) && byField.Matches(fields.Set{"metadata.name": u.GetName(), "involvedObject.name": involved})
	}
}

func (s *Server) review(w http.ResponseWriter, r *http.Request) {
	var review struct {
		APIVersion string         `json:"apiVersion"`
		Kind       string         `json:"kind"`
		Metadata   map[string]any `json:"metadata"`
		Spec       struct {
			ResourceAttributes struct{ Verb, Resource, Subresource string } `json:"resourceAttributes"`
		} `json:"spec"`
		Status map[string]any `json:"status"`
	}
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a := review.Spec.ResourceAttributes
	asked := a.Verb + " " + strings.TrimSuffix(a.Resource+"/"+a.Subresource, "/")
	review.Status = map[string]any{"allowed": !slices.Contains(s.Denied, asked)}
	answer(w, review)
}

func (s *Server) log(w http.ResponseWriter, pod string) {
	text, ok := s.Logs[pod]
	if !ok {
		http.Error(w, `{"kind":"Status","status":"Failure","code":400,"message":"container has not begun"}`, http.StatusBadRequest)
		return
	}
	_, _ = io.WriteString(w, text)
}

func collection(path string) string { return path[:strings.LastIndexByte(path, '/')] }

func answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	var out bytes.Buffer
	if err := json.NewEncoder(&out).Encode(value); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_, _ = w.Write(out.Bytes())
}

func notFound(w http.ResponseWriter, path, name string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusNotFound)
	kind := path[:strings.LastIndexByte(path, '/')]
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Reason: metav1.StatusReasonNotFound, Code: http.StatusNotFound,
		Message: name + " not found", Details: &metav1.StatusDetails{Name: name, Kind: kind[strings.LastIndexByte(kind, '/')+1:]},
	})
}
