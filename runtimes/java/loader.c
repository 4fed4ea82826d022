/* What Java has no way to do: the process's directory, the environment that C sees, and the descriptors. */
#include <errno.h>
#include <fcntl.h>
#include <jni.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DESCRIPTORS = 1024 };

/* text copies bytes as a C string, which the caller frees; NULL with an exception pending if there is no memory. */
static char *text(JNIEnv *env, jbyteArray bytes) {
  jsize length = (*env)->GetArrayLength(env, bytes);
  char *copy = malloc((size_t)length + 1);
  if (copy == NULL) return NULL;
  (*env)->GetByteArrayRegion(env, bytes, 0, length, (jbyte *)copy);
  copy[length] = 0;
  return copy;
}

/* changeDirectory returns 0 or an error number. */
JNIEXPORT jint JNICALL Java_hearth_Host_changeDirectory(JNIEnv *env, jclass class, jbyteArray path) {
  char *directory = text(env, path);
  if (directory == NULL) return ENOMEM;
  int failed = chdir(directory) == 0 ? 0 : errno;
  free(directory);
  return failed;
}

/* setVariable returns 0 or an error number. */
JNIEXPORT jint JNICALL Java_hearth_Host_setVariable(JNIEnv *env, jclass class, jbyteArray name, jbyteArray value) {
  char *key = text(env, name), *set = text(env, value);
  int failed = key == NULL || set == NULL ? ENOMEM : setenv(key, set, 1) == 0 ? 0 : errno;
  free(key);
  free(set);
  return failed;
}

/* detach puts /dev/null in the place of descriptor 0 and keeps all beyond the standard ones from programs that are executed. */
JNIEXPORT jint JNICALL Java_hearth_Host_detach(JNIEnv *env, jclass class) {
  int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (null < 0 || dup2(null, 0) < 0) return errno;
  close(null);
  for (int fd = 3; fd < DESCRIPTORS; fd++) {
    int flags = fcntl(fd, F_GETFD);
    if (flags >= 0) fcntl(fd, F_SETFD, flags | FD_CLOEXEC);
  }
  return 0;
}
