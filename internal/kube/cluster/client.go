package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
)

// fieldManager owns what hearth applies.
const fieldManager = "hearth"

// Client is a cluster. Open makes one.
type Client struct {
	config    *rest.Config
	http      *http.Client
	api       client.WithWatch
	context   string
	namespace string
	now       func() time.Time
}

// Open reads the kubeconfig and makes a client of its cluster, which has not been asked anything yet. The error is Unavailable if there is
// no cluster to talk to.
func Open(c Config) (*Client, error) {
	config, name, err := c.load()
	if err != nil {
		return nil, err
	}
	return open(config, name, c.Namespace)
}

func open(config *rest.Config, name, namespace string) (*Client, error) {
	transport, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", name, err)
	}
	scheme, err := Scheme()
	if err != nil {
		return nil, err
	}
	api, err := client.NewWithWatch(config, client.Options{
		HTTPClient: transport, Scheme: scheme, Mapper: mapper(scheme), FieldOwner: fieldManager, Log: logr.Discard(),
	})
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", name, err)
	}
	if namespace == "" {
		namespace = DefaultNamespace
	}
	return &Client{config: config, http: transport, api: api, context: name, namespace: namespace, now: time.Now}, nil
}

// Scheme has the kinds that a Client asks for.
func Scheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	var problems []error
	for _, add := range []func(*runtime.Scheme) error{
		crd.AddToScheme, corev1.AddToScheme, appsv1.AddToScheme, coordinationv1.AddToScheme, authorizationv1.AddToScheme, apiextensionsv1.AddToScheme,
	} {
		problems = append(problems, add(scheme))
	}
	return scheme, errors.Join(problems...)
}

// clusterScoped are the kinds of the Scheme that are in no namespace.
var clusterScoped = map[string]bool{
	"Node": true, "Namespace": true, "PersistentVolume": true, "CustomResourceDefinition": true,
	"SelfSubjectAccessReview": true, "SelfSubjectRulesReview": true, "SubjectAccessReview": true,
}

// mapper knows the kinds of the Scheme without asking the API server, which would be a round trip or two before each command.
func mapper(scheme *runtime.Scheme) *meta.DefaultRESTMapper {
	m := meta.NewDefaultRESTMapper(nil)
	for gvk := range scheme.AllKnownTypes() {
		if gvk.Version == runtime.APIVersionInternal {
			continue
		}
		scope := meta.RESTScopeNamespace
		if clusterScoped[gvk.Kind] {
			scope = meta.RESTScopeRoot
		}
		m.Add(gvk, scope)
	}
	return m
}

// Context is the name of the kubeconfig's context.
func (c *Client) Context() string { return c.context }

// Namespace has the Functions.
func (c *Client) Namespace() string { return c.namespace }

// Server is the API server's address.
func (c *Client) Server() string { return c.config.Host }

func dialWithin(limit time.Duration) func(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{Timeout: limit, KeepAlive: 30 * time.Second}).DialContext
}

// coded gives an error of the API server the code that the daemons give to the same. What has one keeps it.
func (c *Client) coded(err error) error {
	var known *connect.Error
	var unreachable *url.Error
	switch {
	case err == nil || errors.As(err, &known):
		return err
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	case apierrors.IsNotFound(err):
		return connect.NewError(connect.CodeNotFound, err)
	case meta.IsNoMatchError(err):
		return connect.NewError(connect.CodeUnimplemented, err)
	case apierrors.IsForbidden(err):
		return connect.NewError(connect.CodePermissionDenied, err)
	case apierrors.IsUnauthorized(err):
		return connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("the cluster of context %s does not know you: %w", c.context, err))
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case apierrors.IsConflict(err):
		return connect.NewError(connect.CodeAborted, err)
	case apierrors.IsTooManyRequests(err), apierrors.IsServiceUnavailable(err), apierrors.IsServerTimeout(err), apierrors.IsTimeout(err):
		return connect.NewError(connect.CodeUnavailable, err)
	case errors.As(err, &unreachable):
		return connect.NewError(connect.CodeUnavailable, fmt.Errorf("the API server %s of context %s does not answer: %w", c.config.Host, c.context, unreachable.Err))
	}
	return connect.NewError(connect.CodeUnknown, err)
}

// missing is the error of an object that is not there, or whose kind or namespace is not: then Hearth is not in this cluster.
func (c *Client) missing(err error, kind, name string) error {
	if !apierrors.IsNotFound(err) {
		return c.coded(err)
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		switch details := status.Status().Details; {
		case details == nil || details.Name == "":
			return c.notInstalled()
		case details.Kind == "namespaces":
			return connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no namespace %s in the cluster of context %s", c.namespace, c.context))
		}
	}
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no %s %s", kind, name))
}

// neededBy is the error of a Runtime that cannot go.
func neededBy(function string) error {
	return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("function %s needs it", function))
}

// get asks the API server for what is no object.
func (c *Client) get(ctx context.Context, path string) (*http.Response, error) {
	base, _, err := rest.DefaultServerUrlFor(c.config)
	if err != nil {
		return nil, err
	}
	target, err := base.Parse(strings.TrimSuffix(base.Path, "/") + "/" + path)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, err
	}
	return c.http.Do(req)
}

// maxAnswer bounds what is read of an answer that is an error.
const maxAnswer = 64 << 10

// answered is the error of an answer that is none, in the API server's words.
func answered(resp *http.Response, doing string) error {
	data, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer)) // the status says enough without it
	var status metav1.Status
	if json.Unmarshal(data, &status) == nil && status.Status == metav1.StatusFailure {
		return &apierrors.StatusError{ErrStatus: status}
	}
	return fmt.Errorf("%s: the API server answers %s", doing, resp.Status)
}

// notInstalled is the error of a cluster that does not know Hearth's kinds.
func (c *Client) notInstalled() error {
	return connect.NewError(connect.CodeUnavailable, fmt.Errorf("hearth is not in the cluster of context %s: bring it there with `hearth install`", c.context))
}
